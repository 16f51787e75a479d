"""Known covariances of the levels of a grouping factor, for the argument ``kernels`` of
`jaxreml.fit` and `jaxreml.fit_many`: of relatives, species, places and areas."""

from jaxreml.kernels.genotypes import from_genotypes as from_genotypes
from jaxreml.kernels.known import Inverse as Inverse
from jaxreml.kernels.known import Kernel as Kernel
from jaxreml.kernels.pedigrees import Pedigree as Pedigree
from jaxreml.kernels.pedigrees import pedigree as pedigree
from jaxreml.kernels.phylogenies import phylogeny as phylogeny
from jaxreml.kernels.space import car as car
from jaxreml.kernels.space import icar as icar
from jaxreml.kernels.space import matern as matern
