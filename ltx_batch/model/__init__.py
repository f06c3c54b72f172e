"""Everything that imports torch. This file imports nothing, so that the torch-free parts (plan, sigmas,
pipeline_config, quantize.policy) can be used without it."""
