from egspo_lightning import EGSPOModule, GeneratedDemonstrations, GeneratedProblems, HybridDataModule, PolicyConfig
from egspo_lightning.ops.gate import QuantileGate
from egspo_lightning.training.lazy_defaults import instantiate_lazy_default


def test_modules_built_in_python_have_separate_default_parts():
    modules = [EGSPOModule(PolicyConfig("configs/tiny_model", from_scratch=True)) for _ in range(2)]
    gates = [module.gate for module in modules]
    assert [type(gate) for gate in gates] == [QuantileGate] * 2
    assert gates[0] is not gates[1]
    assert gates[0].top_fraction == 0.2


def test_datamodules_built_in_python_have_separate_default_parts():
    data = [HybridDataModule(GeneratedDemonstrations(), GeneratedProblems()) for _ in range(2)]
    assert data[0].engine is not data[1].engine
    assert data[0].engine.max_batch_size == 256
    assert data[0].reward.grader is not data[1].reward.grader


def test_instantiate_lazy_default_keeps_a_given_part():
    gate = QuantileGate(0.5)
    assert instantiate_lazy_default(gate) is gate
