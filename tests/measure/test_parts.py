"""The part of the model to which a compiled instruction belongs."""

from maxsep.measure import hlo, parts

HLO = """
HloModule jit_train_step, is_scheduled=true

%body (p: (s32[], f32[2,2])) -> (s32[], f32[2,2]) {
  %dot.1 = f32[2,2]{1,0} dot(%a, %b), metadata={op_name="jit(step)/while/body/moe/dispatch/experts/dot_general"}
  %ar.2 = (f32[2]{0}, /*index=1*/f32[2]{0}) all-reduce(%c, %d), metadata={op_name="jit(step)/moe/psum"}
  ROOT %tuple.3 = (s32[], f32[2,2]{1,0}) tuple(%e, %f), metadata={op_name="jit(step)/moe"}
}

ENTRY %main {
  %state.params__head_vd__ = f32[2,2]{1,0} parameter(0), metadata={op_name="state.params['head_vd']"}
  %fusion.4 = f32[2]{0} fusion(%g), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/transpose(jvp(head))/mul"}
  %while.5 = (s32[], f32[2,2]{1,0}) while(%t), body=%body, metadata={op_name="jit(step)/moe/while"}
  %custom-call.6 = f32[2]{0} custom-call(%h), metadata={op_name="jit(step)/attention/top_k"}
  ROOT copy.7 = f32[2]{0} copy(%i)
}
"""


def test_every_instruction_has_its_innermost_scope():
    assert parts.parts_of(hlo.parse(HLO)) == {
        "dot.1": "experts",
        "ar.2": "communication: statistics",
        "tuple.3": "moe",
        "state.params__head_vd__": "other",  # a parameter's name is no scope
        "fusion.4": "head",
        "custom-call.6": "attention",
        "copy.7": "other",
    }
