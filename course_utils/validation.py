"""The checks of `adapter_checks` under the course's roof; see there for what each looks at."""

from adapter_checks import *  # noqa: F403
from adapter_checks import __all__ as __all__
