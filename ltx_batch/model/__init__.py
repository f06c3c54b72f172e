"""Everything that imports torch. This file imports none of it, so that the torch-free parts (plan, sigmas,
pipeline_config, quantize.policy) can be used without it."""

import logging

# It warns on some CPUs, when diffusers imports it, about a 4-bit kernel that nothing here uses, and at every call of every
# layer that it computes in fp16.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
