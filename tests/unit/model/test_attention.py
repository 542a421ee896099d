"""The choice of the attention kernel: what is taken, what is refused, and what is said of it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn.attention import SDPBackend

from relora_ds.config.sections import TrainConfig
from relora_ds.errors import ConfigError
from relora_ds.model import attention_kernels as kernels
from relora_ds.model import documents
from relora_ds.model.attention import check_attention
from relora_ds.model.llama import Llama
from relora_ds.parallel.linear import DenseLinear

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32
FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


@pytest.fixture(autouse=True)
def fresh_choices():
    for cached in (kernels._select, kernels._capability, kernels._activate_fa4):
        cached.cache_clear()
    yield
    for cached in (kernels._select, kernels._capability, kernels._activate_fa4):
        cached.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of a compute capability, where no kernel can be tried out."""

    def of(capability, flash=True):
        def flash_attn_func(q, k, v, causal, deterministic):
            calls.append(deterministic)
            assert causal
            return kernels._sdpa(q, k, v)

        calls = []
        loaded = (flash_attn_func, "") if flash else (None, "No module named 'flash_attn'")
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Toy GPU")
        monkeypatch.setattr(kernels, "_load_flash", lambda: loaded)
        monkeypatch.setattr(kernels, "_try", lambda *args: None)
        monkeypatch.setattr(kernels, "_torch_choice", lambda *args: "flash_attention")
        return calls

    return of


def test_a_kernel_of_gpus_is_refused_where_the_cpu_is_asked_for(plain, gpu, monkeypatch):
    gpu(9)
    Llama(plain, DenseLinear, attention="flash")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ConfigError, match="flash', which needs a CUDA device"):
        Llama(plain, DenseLinear, attention="flash")


def test_a_kernel_of_gpus_is_refused_on_a_machine_without(plain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for backend in ("flash", "fa4", "cudnn"):
        message = rf"{backend}', which needs a CUDA device.*set train\.attention to auto or sdpa"
        with pytest.raises(ConfigError, match=message):
            Llama(plain, DenseLinear, attention=backend)
    with pytest.raises(ConfigError, match="'falsh'; use auto, flash, fa4, cudnn, sdpa or math"):
        Llama(plain, DenseLinear, attention="falsh")


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "missing"),
    [
        (CPU, BF16, 64, "CUDA tensor .got cpu"),
        (GPU, FP32, 64, "fp16 or bf16 .got torch.float32"),
        (GPU, BF16, 320, "head_dim of at most 256 .got 320"),
        (GPU, BF16, 64, None),
        (GPU, torch.float16, 256, None),
    ],
)
def test_flash_attn_serves_gpus_before_hopper(device, dtype, head_dim, missing, gpu):
    gpu(8)
    automatic = kernels.select_kernel("auto", device, dtype, head_dim)
    assert automatic.name == ("sdpa" if missing else "flash")
    assert kernels.select_kernel("sdpa", device, dtype, head_dim).name == "sdpa"
    if missing is None:
        assert kernels.select_kernel("flash", device, dtype, head_dim).name == "flash"
    else:
        with pytest.raises(ConfigError, match=missing):
            kernels.select_kernel("flash", device, dtype, head_dim)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_from_hopper_on_torch_tries_cudnn_first_unless_determinism_is_asked_for(
    backend, gpu, monkeypatch
):
    gpu(9)
    kernel = kernels.select_kernel(backend, GPU, BF16, 128)
    assert kernel == kernels.Kernel("sdpa", kernels._Sdpa((CUDNN, FLASH, EFFICIENT, MATH)))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    kernel = kernels.select_kernel(backend, GPU, BF16, 128)
    assert kernel == kernels.Kernel("sdpa", kernels._Sdpa((FLASH, EFFICIENT, MATH)))
    with pytest.raises(ConfigError, match=r"cudnn.*needs train\.deterministic to be false"):
        kernels.select_kernel("cudnn", GPU, BF16, 128)


def test_older_gpus_and_cpus_keep_the_order_of_torch(gpu):
    gpu(8, flash=False)
    for device, dtype in ((GPU, BF16), (GPU, FP32), (CPU, FP32)):
        assert kernels.select_kernel("auto", device, dtype, 64).attend == kernels._Sdpa(())
    assert kernels.select_kernel("math", GPU, BF16, 64).attend == kernels._Sdpa((MATH,))
    assert kernels.select_kernel("cudnn", GPU, BF16, 64).attend == kernels._Sdpa((CUDNN,))
    with pytest.raises(ConfigError, match=r"package flash-attn .No module named 'flash_attn'"):
        kernels.select_kernel("flash", GPU, BF16, 64)


def test_flash_attention_4_goes_through_the_switch_of_torch(gpu, monkeypatch):
    gpu(10)
    switched = []

    def activate(name):
        switched.append(name)
        if len(switched) == 1:
            raise ModuleNotFoundError("No module named 'flash_attn.cute'")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    with pytest.raises(ConfigError, match=r"package flash-attn-4 .No module named 'flash_attn\.c"):
        kernels.select_kernel("fa4", GPU, BF16, 128)
    kernels._activate_fa4.cache_clear()
    kernels.select_kernel("fa4", GPU, BF16, 128)
    kernel = kernels.select_kernel("fa4", GPU, BF16, 128)
    assert kernel == kernels.Kernel("fa4", kernels._Sdpa((FLASH,)))
    assert switched == ["FA4", "FA4"]


def test_what_only_a_kernel_knows_is_asked_of_it(gpu, monkeypatch):
    """On this machine no kernel for GPUs runs; the words of the one that refuses are passed on."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Toy GPU")
    kernels._try(kernels.Kernel("math", kernels._Sdpa((MATH,))), CPU, BF16, 24, True)
    kernel = kernels.Kernel("cudnn", kernels._Sdpa((CUDNN,)))
    message = "'cudnn', which cannot compute grouped heads of 24 in torch.bfloat16 on Toy GPU: "
    with torch.inference_mode(), pytest.raises(ConfigError, match=message):
        kernels._try(kernel, CPU, BF16, 24, True)


def test_a_run_is_refused_before_it_starts(plain):
    train = TrainConfig(steps=1, seq_length=8, micro_batch_size=1, global_batch_size=1)
    check_attention(train, plain, CPU)
    for backend in ("flash", "fa4", "cudnn"):
        with pytest.raises(ConfigError, match="a CUDA tensor"):
            check_attention(train.model_copy(update={"attention": backend}), plain, CPU)


def test_explicit_flash_fails_at_first_use_on_a_cpu_tensor(plain, gpu, build):
    calls = gpu(8)
    model = build(plain, attention="flash")
    with pytest.raises(ConfigError, match="CUDA tensor"):
        model(torch.arange(9).view(1, 9))
    assert not calls


def test_flash_gets_heads_in_its_own_layout(plain, gpu, build, monkeypatch):
    calls = gpu(8)
    tokens = torch.arange(18).view(2, 9)
    expected = build(plain, attention="sdpa")(tokens)
    monkeypatch.setattr(kernels, "_select", lambda *args: kernels.Kernel("flash", kernels._flash))
    assert torch.equal(build(plain)(tokens), expected)
    assert calls == [False, False]


def test_documents_take_lengths_where_there_is_a_kernel_for_them(gpu, monkeypatch):
    gpu(9)
    by_torch = kernels._Lengths(documents.torch_lengths)
    for backend in ("auto", "sdpa"):
        kernel = kernels.select_kernel(backend, GPU, BF16, 64, documents=True)
        assert kernel == kernels.Kernel("sdpa", by_torch)
    for backend, device, dtype in (("auto", CPU, BF16), ("sdpa", CPU, FP32)):
        kernel = kernels.select_kernel(backend, device, dtype, 64, documents=True)
        assert kernel.attend == kernels._Sdpa(())
    order = (CUDNN, FLASH, EFFICIENT, MATH)
    in_fp32 = kernels.select_kernel("auto", GPU, FP32, 64, documents=True)
    assert in_fp32 == kernels.Kernel("sdpa", kernels._Sdpa(order))
    by_package = kernels.Kernel("flash", kernels._Lengths(documents.flash_lengths))
    assert kernels.select_kernel("flash", GPU, BF16, 64, documents=True) == by_package
    monkeypatch.setattr(kernels, "_activate_fa4", lambda: "")
    fourth = kernels.select_kernel("fa4", GPU, BF16, 64, documents=True)
    assert fourth == kernels.Kernel("fa4", by_torch)
    math = kernels.select_kernel("math", GPU, BF16, 64, documents=True)
    assert math == kernels.Kernel("math", kernels._Sdpa((MATH,)))


@pytest.mark.parametrize("capability", [8, 9])
def test_documents_take_a_mask_where_lengths_cannot_be_computed(
    capability, gpu, monkeypatch, caplog
):
    gpu(capability)

    def refuse(kernel, *args, **kwargs):
        if isinstance(kernel.attend, kernels._Lengths):
            raise ConfigError("no kernel image")

    monkeypatch.setattr(kernels, "_try", refuse)
    with caplog.at_level(logging.INFO):
        kernel = kernels.select_kernel("auto", GPU, BF16, 64, documents=True)
    assert isinstance(kernel.attend, kernels._Sdpa)
    assert "documents by a mask" in caplog.text
    with pytest.raises(ConfigError, match="no kernel image"):
        kernels.select_kernel("flash", GPU, BF16, 64, documents=True)


def test_math_equals_the_fused_kernel_in_both_directions(plain, build):
    tokens = torch.arange(18).view(2, 9)
    gradients = []
    for backend in ("sdpa", "math"):
        model = build(plain, attention=backend)
        model(tokens).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for fused, plain_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, plain_gradient)


def test_the_choice_is_logged_once(plain, build, caplog):
    with caplog.at_level(logging.INFO, logger="relora_ds.model.attention_kernels"):
        for _ in range(2):
            build(plain)(torch.arange(9).view(1, 9))
    (message,) = caplog.messages
    assert message.startswith("attention kernel for cpu torch.float32: sdpa")
