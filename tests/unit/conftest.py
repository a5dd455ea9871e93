"""Random tests: the same examples each time in CI, others elsewhere; HYPOTHESIS_PROFILE=long runs 10,000 of each."""

import os

from hypothesis import HealthCheck, settings

# A machine that is busy with other things is slow: that is no failure of a property.
settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.register_profile("long", settings.get_profile("patient"), max_examples=10_000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "patient"))
