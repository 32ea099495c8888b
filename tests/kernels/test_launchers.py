"""What the launchers have Triton compile for a GPU, seen without one: it is what is compiled ahead of time."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from fsam_triton.kernels import segments, spec
from fsam_triton.kernels.directions import Along
from fsam_triton.kernels.segments import Plan, Segments

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from bench import kernel_builds as kb
from fsam_triton.kernels import descend, gap, norm, perturb, sparse

N = 4096
TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
BUILDS = [one for one in kb.configurations() if kb.is_over_segments(one)]
# Triton keeps what it knows of a device, by its number.
devices = itertools.count(1000)


@pytest.fixture
def launched():
    """`launched(backend, function, *args)`: what the function has compiled, as Triton's hook is told; nothing runs."""

    def launch(backend: str, function, *args) -> dict:
        device, found = next(devices), []
        driver = SimpleNamespace(
            get_current_device=lambda: device,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: TARGETS[backend],
        )

        def hook(*, compile, **_) -> bool:
            found.append(compile)
            return True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
            patch.setattr(triton.runtime.driver, "_active", driver)
            function(*args)
        (only,) = found
        return only

    return launch


def call(one: kb.Build) -> tuple:
    """A launcher with arguments for which it should launch a build."""
    pointers, flags = dict(one.pointers), dict(one.flags)
    plan = Plan([N, 5], torch.device("cpu"))

    def tensors(name: str):
        dtype = kb.DTYPES[pointers.get(name, "fp32")]
        return [torch.zeros(n, dtype=dtype) for n in plan.lengths]

    def lane(name: str):
        size = plan.size // 32 if name in ("mask_ptr", "scale_ptr") else plan.size
        return torch.zeros(size, dtype=kb.DTYPES[pointers[name]]) if name in pointers else None

    def coefficients(columns) -> torch.Tensor:
        return torch.zeros(2, len(columns), dtype=kb.DTYPES[pointers["coef_ptr"]])

    def along():
        if "lane_ptr" not in pointers:
            return lane("scale_ptr"), None
        steers = torch.zeros(2, len(spec.DIRECTION), dtype=kb.DTYPES[pointers["along_ptr"]])
        return None, Along(flags["ALONG"], lane("lane_ptr"), steers, lane("scale_ptr"))

    key = torch.zeros(2, dtype=torch.int32)
    if one.kernel is gap.gap_kernel:
        return gap.gap, Segments(plan, tensors("first_ptr"), tensors("second_ptr"), other=tensors("first_ptr"))
    given = Segments(
        plan,
        tensors("weight_ptr"),
        tensors("grad_ptr"),
        clean=tensors("clean_ptr"),
        other=tensors("other_ptr") if "other_ptr" in pointers else None,
    )
    if one.kernel is norm.norm_kernel:
        return norm.norm_sq, given, "weight_ptr" in pointers, lane("mask_ptr"), *along()
    if one.kernel is perturb.perturb_kernel:
        coef, options = coefficients(spec.PERTURB), (flags["ADAPTIVE"], flags["STOCHASTIC"], flags["RANDOM"])
        return perturb.perturb_, given, lane("backup_ptr"), lane("mask_ptr"), coef, key, *options, *along()
    state = [torch.zeros(plan.size, dtype=kb.DTYPES[name]) for name in pointers["state_ptrs"]]
    others = (lane(f"{name}_ptr") for name in ("remainder", "anchor", "ema", "orthogonal"))
    coef = coefficients(spec.DESCEND[flags["RULE"]])
    scales = [torch.zeros(plan.size // 32, dtype=kb.DTYPES[name]) for name in pointers.get("scale_ptrs", ())]
    options = (flags["RULE"], flags["STOCHASTIC"], scales, lane("steps_ptr"))
    return descend.descend_, given, state, *others, coef, key, *options


@pytest.mark.parametrize("one", BUILDS, ids=lambda one: one.name)
def test_what_is_launched_is_what_is_compiled_ahead_of_time(launched, one):
    """Signature, constants, alignment of each pointer, warps, fusion."""
    found, source = launched("cuda", *call(one)), one.source()
    assert found["signature"] == source.signature
    assert {k: v for k, v in found["constants"].items() if v is not None} == {
        k: v for k, v in source.constants.items() if v is not None
    }
    assert {place: a for place, a in found["configs"][0].items() if a} == source.attrs
    assert found["num_warps"] == one.warps(32)
    assert found["enable_fp_fusion"] == dict(one.options)["enable_fp_fusion"]


@pytest.mark.parametrize("one", [BUILDS[0], kb.norm_build("bf16"), kb.gap_build("fp32")], ids=lambda one: one.name)
def test_nothing_is_known_of_the_extent_of_what_tables_count_from(launched, one):
    """On AMD Triton takes offsets from small tensors for 32-bit numbers: right for lanes, wrong for other tensors."""
    attributes = launched("hip", *call(one))["configs"][0]
    names = [parameter.name for parameter in one.kernel.params]
    limited = {names[place[0]] for place, found in attributes.items() if ["tt.pointer_range", 32] in found}
    anchors = {parameter.name for parameter in one.kernel.params if parameter.do_not_specialize}
    assert anchors & set(dict(one.pointers))
    assert not limited & anchors
    assert limited >= {"table_ptr", "segments_ptr"}


# -- gather and scatter ------------------------------------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch) -> list:
    """Tables that are sent to the device."""
    found, upload = [], segments.upload
    monkeypatch.setattr(segments, "upload", lambda host, device: found.append(host.clone()) or upload(host, device))
    sparse._tables.cache_clear()
    yield found
    sparse._tables.cache_clear()


def gather(launched, tensors: list[torch.Tensor]) -> dict:
    index, out = torch.zeros(8, dtype=torch.int32), torch.zeros(8)
    return launched("hip", sparse.gather_, out, tensors, index, [0, 4], [4, 4])


def test_tables_of_a_gather_are_sent_once(launched, sent):
    tensors = [torch.zeros(10), torch.zeros(10)]
    for _ in range(3):
        gather(launched, tensors)
    places, jobs = sent
    assert places.tolist() == [0, (tensors[1].data_ptr() - tensors[0].data_ptr()) // 4]
    assert jobs.tolist() == [[0, 0, 4], [1, 4, 8]]


def test_tensors_that_have_moved_are_found_where_they_are(launched, sent):
    tensors = [torch.zeros(10), torch.zeros(10)]
    gather(launched, tensors)
    tensors[1] = torch.zeros(20)[5:]
    gather(launched, tensors)
    assert len(sent) == 3
    assert sent[-1].tolist() == [0, (tensors[1].data_ptr() - tensors[0].data_ptr()) // 4]


def test_nothing_is_known_of_the_extent_of_a_tensor_that_others_are_counted_from(launched, sent):
    found = gather(launched, [torch.zeros(10), torch.zeros(10)])
    place = list(sparse.sparse_kernel.arg_names).index("anchor_ptr")
    assert (place,) not in {where for where, attributes in found["configs"][0].items() if attributes}
