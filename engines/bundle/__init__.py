"""The bundle format: what a directory holds, and the checks that it is whole and belongs together."""
