"""What `retry_smaller` makes of a run that was out of memory; the run itself: tests/integration/test_faults.py."""

from pathlib import Path

from slothrl.compose import compose_config
from slothrl.faults import OutOfMemoryFault
from slothrl.retry import halved, smaller_run


def test_what_a_smaller_run_is():
    config = compose_config(["gpu=cpu", "retry_smaller=true", "trainer.per_device_train_batch_size=8"])
    fault = OutOfMemoryFault("no memory", "backward")
    command = ["algo=grpo", "output_dir=here", "resume=auto", "trainer.per_device_train_batch_size=8"]
    again = smaller_run(config, fault, Path("/there"), command)
    sizes = ["trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=2"]
    ending = ["output_dir=/there", "resume=auto", "resume_changed=true", "retry_smaller=false"]
    assert again == ["algo=grpo", *sizes, *ending]
    assert smaller_run(config, OutOfMemoryFault("no memory", "rollout"), Path("/there"), command) == []
    packed = smaller_run(config, OutOfMemoryFault("no memory", "backward", packed=5001), Path("/there"), command)
    assert packed == [*command[:1], command[3], "packing.tokens_per_micro_batch=2500", *ending]
    config.trainer.steps_per_generation = 3
    assert halved(config)[-1] == "trainer.steps_per_generation=6"
    config.trainer.per_device_train_batch_size = 7
    assert halved(config) == []
    config.retry_smaller, config.trainer.per_device_train_batch_size = False, 8
    assert smaller_run(config, fault, Path("/there"), command) == []
