"""`vocabtrim report`: an export explained on one page, as HTML, Markdown or JSON. Nothing here needs torch."""
