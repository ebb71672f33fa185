"""Notes about settings of a config.json that the export does not follow."""

from transformers import PreTrainedConfig, PreTrainedModel

from vocabtrim_export.sources.architecture import ignores_its_window


def own_code_note(spec: str, config: PreTrainedConfig) -> tuple[str, ...]:
    """Returns a note where a checkpoint of a known architecture brings a model class of its own."""
    if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        return ()
    return (
        f"{spec} brings its own code (auto_map in config.json), which is not run: it is read as transformers' own "
        f"{config.model_type}",
    )


def ignored_window_note(spec: str, config: PreTrainedConfig, kind: type[PreTrainedModel]) -> tuple[str, ...]:
    """Returns a note where config.json states a sliding window that the architecture does not have."""
    if not ignores_its_window(config, kind):
        return ()
    return (
        f"the config.json of {spec} states a sliding window of {config.sliding_window} tokens, which transformers' "
        f"{config.model_type} does not have: every layer attends to all of the text",
    )
