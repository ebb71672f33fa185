"""What the extra `export` installs, and the message where it is missing."""

_PACKAGES = {"accelerate", "gguf", "onnx_ir", "onnxscript", "sentencepiece", "torch", "transformers"}


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Returns what to install for a package of the extra `export` that is missing; None for any other package."""
    package = (error.name or "").partition(".")[0]
    if package not in _PACKAGES:
        return None
    return f"this needs {package}, which is not installed: pip install 'vocabtrim-export[export]'"
