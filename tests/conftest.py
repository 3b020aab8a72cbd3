"""What every test's process is told before it loads a library."""

import os

# Many small models are fitted, on machines that do other things beside: threads that wait for each other cost more than
# they give. And nobody is to hear that tests are run.
for name, value in {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}.items():
    os.environ.setdefault(name, value)
