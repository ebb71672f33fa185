import copy

import pytest
import torch

from vocabtrim_export.sources.precision import calibration_model


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_calibrating_in_another_dtype_leaves_the_model_as_it_was(model, dtype, has_bf16, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    mine = copy.deepcopy(model)
    for parameter in mine.parameters():
        parameter.data = parameter.data.to(dtype)
    before = {name: value.clone() for name, value in [*mine.named_parameters(), *mine.named_buffers()]}
    with calibration_model(mine) as sampled:
        assert sampled.dtype == (torch.bfloat16 if has_bf16 else torch.float32)
        for name, buffer in sampled.named_buffers():  # rotary frequencies above all
            assert torch.equal(buffer, before[name]), name
    for name, value in [*mine.named_parameters(), *mine.named_buffers()]:
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
