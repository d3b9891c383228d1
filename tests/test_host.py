"""Settings of a CPU process, each seen in a process of its own."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from kvjax import host
if sys.argv[1] == "prepared":
    host.prepare(2)
else:
    jax.config.update("jax_num_cpu_devices", 2)
f = jax.jit(lambda x: jnp.sum(jnp.sort(x).reshape(-1, 1024) @ jnp.ones((1024, 1024)), axis=0))
x = jnp.ones(1 << 24)  # 64 MB; its temporaries are more than an arena of a thread
for _ in range(4):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    f(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4)
"""


def faults_per_call(how):
    run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return float(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_prepared_process_keeps_the_pages_of_its_temporaries():
    plain = faults_per_call("plain")
    if plain < 10_000:
        pytest.skip("this allocator keeps its pages by itself")
    assert faults_per_call("prepared") < plain / 4


def test_devices_divide_the_batch():
    code = "import jax, kvjax.host as h; h.prepare(3); print(3 % jax.device_count())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0"
