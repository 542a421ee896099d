"""Stage C: loss and gradients of the model on the device against fp32 on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.gpu.case import Case, CaseSkippedError, Figures, Sizes
from benchmarks.gpu.runs import METHODS, architecture, batches, run_config
from relora_ds.errors import ConfigError
from relora_ds.methods.build import build_model
from relora_ds.methods.formulation.choice import update_of
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.model.attention_kernels import select_kernel
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.parallel.linear import weights_stay
from relora_ds.parallel.tensor import SINGLE

_LAYERS = 4
_TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
_KERNELS = ("sdpa", "math", "cudnn", "flash", "fa4")


def cases(tiny: bool) -> list[Case]:
    """Every method, in both precisions, with every kernel of the attention."""
    found = []
    for method in METHODS:
        for precision in ("fp32", "bf16"):
            kernels = _KERNELS if precision == "bf16" and method == "relora" else ("sdpa",)
            arguments = {"method": method, "precision": precision}
            for kernel in kernels:
                name = f"{method} {precision} {kernel}"
                settings = arguments | {"attention": kernel}
                found.append(Case("C", name, gradients, settings, expected_s=5, value=8))
    for method in ("full", "relora", "sltrain", "galore"):
        how = {"method": method, "precision": "fp32", "attention": "sdpa", "padded": True}
        found.append(Case("C", f"{method} padded MLP", gradients, how, expected_s=5, value=8))
    for precision, kernel in (
        ("fp32", "sdpa"),
        ("bf16", "sdpa"),
        ("bf16", "flash"),
        ("bf16", "fa4"),
    ):
        how = {"method": "full", "precision": precision, "attention": kernel, "documents": True}
        name = f"documents {precision} {kernel}"
        found.append(Case("C", name, gradients, how, expected_s=5, value=8))
    return found


def gradients(
    device: torch.device,
    sizes: Sizes,
    method: str,
    precision: str,
    attention: str,
    documents: bool = False,
    padded: bool = False,
) -> Figures:
    """Loss and all gradients, relative to the largest of each parameter's; with documents that are
    kept apart, or an MLP that is computed at a padded width on the device, if they are to be."""
    assert not torch.backends.cuda.matmul.allow_tf32, "TF32 is on, but nobody asked for it"
    shape = architecture(sizes).model_copy(update={"num_hidden_layers": _LAYERS})
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    try:
        select_kernel(attention, device, dtype, shape.head_dim, grouped=True, documents=documents)
    except ConfigError as reason:
        raise CaseSkippedError(str(reason)) from None
    settings: dict[str, Any] = {"precision": precision, "attention": attention}
    found = _backward(shape, method, device, settings, documents, padded)
    expected = _backward(shape, method, torch.device("cpu"), {"attention": "math"}, documents)
    loss = abs(found[0] - expected[0]) / abs(expected[0])
    limit = _TOLERANCE[precision]
    assert loss <= limit, f"the loss is off by {loss:.2g}"
    worst, where = 0.0, ""
    for name, gradient in expected[1].items():
        error = float((found[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-30))
        if error > worst:
            worst, where = error, name
    # rounded activations: a gradient is a sum over tokens of products of them
    allowed = limit if precision == "fp32" else 3 * limit
    assert worst <= allowed, f"the gradient of {where} is off by {worst:.2g}"
    return {"loss_error": loss, "gradient_error": worst, "worst": where}


def _backward(
    shape: Any,
    method: str,
    device: torch.device,
    settings: dict[str, Any],
    documents: bool,
    padded: bool = False,
) -> tuple[float, dict[str, torch.Tensor]]:
    config = run_config(METHODS[method], **settings)
    initial = InitialWeights(shape, config.train.seed)

    def source(name: str, dimensions: tuple[int, ...]) -> torch.Tensor:
        # drawn where the reference is: this case is not about draws
        return initial(name, dimensions, torch.device("cpu")).to(device)

    described = plan_phases(config)[-1].method
    model: Llama = build_model(shape, described, config.train, source, device, None, SINGLE)
    if settings.get("precision") == "bf16":
        model.bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("lora_B"):
                # zero factors hide the gradients of the others
                values = torch.arange(parameter.numel(), dtype=torch.float32).sin().mul_(0.05)
                parameter.copy_(values.view_as(parameter))
    tokens = batches(config, shape.vocab_size, 1)[0]
    if documents:  # whichever id stands there ends them, wherever it stands
        model.separate_documents(int(tokens[0, tokens.shape[1] // 3]))
    layers = list(projection_layers(model).values())
    update = update_of(layers, config.train, 0, 1, device.type, None)
    # outside an update every layer computes at the widths of its weights
    with weights_stay(layers, update) if padded else nullcontext():
        loss = model(tokens.to(device))
        loss.backward()
    named = {
        name: parameter.grad.detach().float().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return float(loss.detach()), named
