"""What single instructions compute and move, in the forms in which XLA writes them for GPUs."""

import math

import pytest

from maxsep.measure import hlo, work

CUBLAS = """%c.1 = (f32[30,20]{1,0}, s8[64]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul",
 backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],
 "rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]},
 "precision_config":{"operand_precision":["DEFAULT","DEFAULT"]}}}"""
DOT = "%c.1 = f32[30,20]{1,0} dot(%x, %y), lhs_contracting_dims={0}, rhs_contracting_dims={0}"
TRITON = """%c.1 = f32[30,20]{1,0} fusion(%x, %y), kind=kCustom, calls=%nested,
 backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}"""
NESTED = f"""%nested (p.0: f32[50,30], p.1: f32[50,20]) -> f32[30,20] {{
  %p.0 = f32[50,30] parameter(0)
  %p.1 = f32[50,20] parameter(1)
  ROOT {DOT.replace("%x", "%p.0").replace("%y", "%p.1").replace("%c.1", "%d.1")}
}}
"""
OPERANDS = "  %x = f32[50,30]{1,0} parameter(0)\n  %y = f32[50,20]{1,0} parameter(1)\n"


def instruction(line: str, operands: str = OPERANDS, before: str = "") -> tuple[hlo.Module, hlo.Instruction]:
    line = line.replace("\n", "")
    module = hlo.parse(f"HloModule m\n\n{before}\nENTRY %main (x: f32[]) -> f32[] {{\n{operands}  ROOT {line}\n}}\n")
    return module, module.root("main")


@pytest.mark.parametrize("line, before", [(DOT, ""), (CUBLAS, ""), (TRITON, NESTED)], ids=["dot", "cublas", "triton"])
def test_a_product_is_counted_in_each_form(line, before):
    module, found = instruction(
        line, OPERANDS if not before else OPERANDS.replace("%x", "%a").replace("%y", "%b"), before
    )
    assert work.flops(module, found) == {"f32": 2 * 30 * 20 * 50}


@pytest.mark.parametrize(
    "line",
    [f"{DOT}, operand_precision={{highest,highest}}", CUBLAS.replace("DEFAULT", "HIGHEST")],
    ids=["dot", "cublas"],
)
def test_highest_precision_is_its_own_rate(line):
    assert work.flops(*instruction(line)) == {"f32 highest": 2 * 30 * 20 * 50}


@pytest.mark.parametrize(
    "left, right, result, form",
    [
        ("50,30", "50,20", "30,20", "{}, dim_labels=fb_io->bf"),
        # A weight of 6 heads: their window meets the one element in its midst.
        ("8,30,50,1", "50,6,20,1", "8,30,6,20", "{size=1x6 pad=0_0x5_5 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f"),
        # A product of each of 8 x 6: between the elements there are holes.
        ("8,6,30,50", "8,6,20,50", "8,6,30,20", "{size=8x6 stride=7x5 lhs_dilate=8x6}, dim_labels=01bf_01oi->01bf"),
    ],
    ids=["plain", "padded", "dilated"],
)  # fmt: skip
def test_a_product_is_a_convolution_on_tpus(left, right, result, form):
    operands = f"  %x = bf16[{left}]{{0}} parameter(0)\n  %y = bf16[{right}]{{0}} parameter(1)\n"
    module, found = instruction(f"%c.1 = f32[{result}]{{0}} convolution(%x, %y), window={form}", operands)
    assert work.flops(module, found) == {"bf16": 2 * 50 * math.prod(found.arrays[0].dims)}


def test_what_lies_on_the_chip_moves_no_bytes():
    operands = "  %x = f32[8,128]{1,0:T(8,128)} parameter(0)\n  %y = f32[8,128]{1,0:T(8,128)S(1)} parameter(1)\n"
    assert work.moved(*instruction("%c.1 = f32[8,128]{1,0:T(8,128)S(1)} add(%x, %y)", operands)) == 4 * 8 * 128
    line = "%c.1 = f32[2,128]{1,0:T(8,128)S(1)} slice(%x), slice={[0:2], [0:128]}"
    assert work.moved(*instruction(line, operands)) == 4 * 2 * 128


@pytest.mark.parametrize(
    "target, mask, products",
    [
        ("__cudnn$fmhaSoftmax", "CAUSAL", 2 / 2),
        ("__cudnn$fmhaSoftmaxBackward", "CAUSAL", 5 / 2),
        ("__cudnn$fmhaScaleBiasSoftmax", "NO_MASK", 2),
    ],
)
def test_attention_is_priced_from_its_shapes(target, mask, products):
    b, s, h, q = 2, 64, 3, 16
    operands = "".join(f"  %{name} = bf16[{b},{s},{h},{q}] parameter({at})\n" for at, name in enumerate("xyz"))
    line = (
        f"%c.1 = (bf16[{b},{h},{s},{q}], u8[0]) custom-call(%x, %y, %z), "
        f'custom_call_target="{target}", backend_config={{"mask_type": "{mask}"}}'
    )
    module, found = instruction(line, operands)
    assert work.flops(module, found) == {"bf16": products * 2 * b * h * s * s * q}
    assert work.moved(module, found) == 4 * b * s * h * q * 2, "workspaces are not moved"


@pytest.mark.parametrize("kernel, kind", [("", "bf16"), ("_highest", "bf16 highest")])
def test_grouped_products_cost_the_rows_that_there_are(kernel, kind):
    R, E, K, N = 60, 4, 8, 16

    def counted(name, operands, result):
        lines = "".join(f"  %{chr(97 + at)} = {shape} parameter({at})\n" for at, shape in enumerate(operands))
        names = ", ".join(f"%{chr(97 + at)}" for at in range(len(operands)))
        path = f'metadata={{op_name="jit(f)/experts/{name}{kernel}/pallas_call"}}'
        line = f'%c.1 = {result} custom-call({names}), custom_call_target="__gpu$xla.gpu.triton", {path}'
        return work.flops(*instruction(line, lines), 0.75)

    tiles = ["s32[5]"] * 3
    rows = counted("grouped_rows", [*tiles, f"bf16[{R},{K}]", f"bf16[{E},{K},{N}]"], f"bf16[{R},{N}]")
    transposed = counted("grouped_rows", [*tiles, f"bf16[{R},{N}]", f"bf16[{E},{K},{N}]"], f"bf16[{R},{K}]")
    weights = counted("grouped_weights", [*tiles[:2], f"bf16[{R},{K}]", f"bf16[{R},{N}]"], f"bf16[{E},{K},{N}]")
    assert rows == transposed == weights == {kind: 0.75 * 2 * R * K * N}


def test_a_library_call_that_nobody_has_priced_is_not_zero():
    module, found = instruction('%c.1 = f32[8] custom-call(%x), custom_call_target="__new$library"')
    assert work.product(module, found) is None
    module, found = instruction('%c.1 = f32[8] custom-call(%x), custom_call_target="TopK"')
    assert work.product(module, found) == {}


FUSED = """%fused (p.0: f32[8,100], p.1: f32[100], p.2: s32[]) -> f32[8,100] {
  %p.0 = f32[8,100]{1,0} parameter(0)
  %p.1 = f32[4,100]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %z = s32[] constant(0)
  %old = f32[1,100]{1,0} dynamic-slice(%p.0, %p.2, %z), dynamic_slice_sizes={1,100}
  %flat = f32[400]{0} bitcast(%p.1)
  %half = f32[100]{0} slice(%flat), slice={[0:100]}
  %new = f32[1,100]{1,0} bitcast(%half)
  %sum = f32[1,100]{1,0} add(%old, %new)
  ROOT %put = f32[8,100]{1,0} dynamic-update-slice(%p.0, %sum, %p.2, %z)
}
"""
THREE = "  %a = f32[8,100]{1,0} parameter(0)\n  %b = f32[4,100]{1,0} parameter(1)\n  %n = s32[] parameter(2)\n"


@pytest.mark.parametrize(
    "line, moved",
    [
        # A row is read, one of another array's, an index, and the row is written.
        ("%f = f32[8,100]{1,0} fusion(%a, %b, %n), kind=kLoop, calls=%fused", 400 + 400 + 4 + 400),
        ("%f = f32[1,100]{1,0} dynamic-slice(%a, %n, %n), dynamic_slice_sizes={1,100}", 2 * 400 + 2 * 4),
        ("%f = f32[8,100]{1,0} dynamic-update-slice(%a, %b, %n, %n)", 2 * 1600),
        ("%f = f32[8,100]{1,0} add(%a, %a)", 3 * 3200),
    ],
    ids=["fusion", "slice", "update", "add"],
)
def test_slices_count_and_not_what_they_are_of(line, moved):
    assert work.moved(*instruction(line, THREE, FUSED)) == moved


def test_an_operand_that_is_also_read_whole_counts_whole():
    whole = FUSED.replace("%sum = f32[1,100]{1,0} add(%old, %new)", "%sum = f32[1,100]{1,0} reduce(%p.0, %new)")
    line = "%f = f32[8,100]{1,0} fusion(%a, %b, %n), kind=kLoop, calls=%fused"
    assert work.moved(*instruction(line, THREE, whole)) == 3200 + 400 + 4 + 400
