# The public names, and where they live. `jaxreml/__init__.py` reads them from here.
from jaxreml import datasets as datasets
from jaxreml import inference as inference
from jaxreml.api.fit import fit as fit
from jaxreml.api.fit_many import fit_many as fit_many
from jaxreml.api.score_tests import score_tests as score_tests
from jaxreml.api.voom import Voom as Voom
from jaxreml.api.voom import voom as voom
from jaxreml.backend.compilation import enable_compilation_cache as enable_compilation_cache
from jaxreml.data import counts as counts
from jaxreml.data.frame import design as design
from jaxreml.data.images import Images as Images
from jaxreml.errors import ConvergenceWarning as ConvergenceWarning
from jaxreml.errors import DataError as DataError
from jaxreml.errors import EstimabilityWarning as EstimabilityWarning
from jaxreml.errors import FormulaError as FormulaError
from jaxreml.errors import JaxremlError as JaxremlError
from jaxreml.errors import PrecisionError as PrecisionError
from jaxreml.inference.likelihood.comparison import compare as compare
from jaxreml.inference.resampling.power import power as power
from jaxreml.inference.resampling.simulation import population as population
from jaxreml.model.arrays import Term as Term
from jaxreml.model.design import Design as Design
from jaxreml.model.design import stack as stack
from jaxreml.model.objective import ml_objective as ml_objective
from jaxreml.model.objective import reml_objective as reml_objective
from jaxreml.optimum.estimate import estimate as estimate
from jaxreml.optimum.report import Estimate as Estimate
from jaxreml.results import batch_plots as batch_plots
from jaxreml.results import plots as plots
from jaxreml.results.batch import BatchResults as BatchResults
from jaxreml.results.moderated import ModeratedResults as ModeratedResults
from jaxreml.results.results import LMMResults as LMMResults
from jaxreml.results.results import load as load
from jaxreml.results.streamed import StreamedResults as StreamedResults
from jaxreml.status import Status as Status

__version__: str
