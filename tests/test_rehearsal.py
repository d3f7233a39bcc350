"""A rehearsal of the forward path on a GPU, without one: tensors of device "cuda" that have a shape and no content.
Torch refuses operations on two devices, as on a GPU. The backward pass would need CUDA."""

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import tgdpo


class Rehearsal(TorchFunctionMode):
    """What is moved to "cuda" loses its content; what has one can stay on the CPU only."""

    def __init__(self):
        self.empty = FakeTensorMode(allow_non_fake_inputs=False)

    def move(self, tensor):
        with unset_fake_temporarily():
            return FakeTensor(self.empty, torch.empty_like(tensor, device="meta"), torch.device("cuda"))

    def index(self, tensor, index):
        """tensor[index], for which torch would ask CUDA. An index on the CPU would make a GPU wait."""
        assert all(getattr(i, "is_cuda", True) for i in tree_leaves(index)), "an index on the CPU"
        shape_of = lambda x: torch.empty_like(x, device="meta") if isinstance(x, torch.Tensor) else x
        with unset_fake_temporarily():
            return self.move(shape_of(tensor)[tree_map(shape_of, index)])

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and "cuda" in (*args[1:], *(kwargs or {}).values()):
            return self.move(args[0])
        if function is torch.Tensor.__getitem__ and args[0].is_cuda:
            return self.index(*args)
        function = torch.Tensor.clone if function is torch.Tensor.contiguous else function  # it would ask, too
        return function(*args, **kwargs or {})


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_the_forward_path_stays_on_the_gpu(monkeypatch):
    """Log-probs in chunks, and the loss of a batch with all its columns, by a model whose weights are there."""
    monkeypatch.setattr(tgdpo, "logits_rows", lambda model, device: 3)
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **sizes)).eval()
    rows = {"prompt_ids": [[1, 2, 3], [1]], "chosen_ids": [[4, 5], [6]], "rejected_ids": [[6], [7, 8, 9]]}
    for side in tgdpo.SIDES:
        rows |= {f"{side}_{column}": rows[f"{side}_ids"] for column in ("ref_logps", "rewards")}
    with Rehearsal() as rehearsal:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: rehearsal.move(x) for name, x in tensors.items() if x is not None})
        batch = tgdpo.collate(rows, "cuda")
        with rehearsal.empty:
            model.token_logps = lambda batch: tgdpo.token_logps(model, batch, dtype="bfloat16")
            logps = model.token_logps(batch)
            losses, totals = tgdpo.losses_and_totals(model, batch, tgdpo.Options(device="cpu"))
    assert {x.device.type for x in [logps, losses, *totals.values()]} == {"cuda"}
    assert logps.shape == (4, 3) and losses.shape == (2,)
