"""Known covariances of the levels of a grouping factor, for the argument ``kernels``."""

from jaxreml.kernels.known import Inverse as Inverse
from jaxreml.kernels.known import Kernel as Kernel
