"""Plots of fits; they need ``pip install 'jaxreml[plots]'``.

Every function draws on `ax`, or on a new figure, and returns the Axes (an array of them where there
are several panels). What it draws is the frame that the function of the same name with ``_data``
gives, to be drawn by other means. Colours are Okabe and Ito's, which colour-blind readers can tell
apart. matplotlib is imported when something is drawn.
"""

from jaxreml.results.plots.effect_plots import effects as effects
from jaxreml.results.plots.effect_plots import effects_data as effects_data
from jaxreml.results.plots.effect_plots import effects_groups_data as effects_groups_data
from jaxreml.results.plots.fixed_effects import coefficients as coefficients
from jaxreml.results.plots.fixed_effects import coefficients_data as coefficients_data
from jaxreml.results.plots.fixed_effects import emmeans as emmeans
from jaxreml.results.plots.fixed_effects import emmeans_data as emmeans_data
from jaxreml.results.plots.likelihood import profile_contour as profile_contour
from jaxreml.results.plots.likelihood import profile_contour_data as profile_contour_data
from jaxreml.results.plots.likelihood import profile_zeta as profile_zeta
from jaxreml.results.plots.likelihood import profile_zeta_data as profile_zeta_data
from jaxreml.results.plots.random_effects import caterpillar as caterpillar
from jaxreml.results.plots.random_effects import caterpillar_data as caterpillar_data
from jaxreml.results.plots.random_effects import qq_modes as qq_modes
from jaxreml.results.plots.random_effects import qq_modes_data as qq_modes_data
from jaxreml.results.plots.random_effects import shrinkage as shrinkage
from jaxreml.results.plots.random_effects import shrinkage_data as shrinkage_data
from jaxreml.results.plots.resampling import bootstrap_density as bootstrap_density
from jaxreml.results.plots.resampling import bootstrap_density_data as bootstrap_density_data
from jaxreml.results.plots.residuals import diagnostics as diagnostics
from jaxreml.results.plots.residuals import qq_residuals as qq_residuals
from jaxreml.results.plots.residuals import qq_residuals_data as qq_residuals_data
from jaxreml.results.plots.residuals import residuals_fitted as residuals_fitted
from jaxreml.results.plots.residuals import residuals_fitted_data as residuals_fitted_data
from jaxreml.results.plots.residuals import scale_location as scale_location
from jaxreml.results.plots.residuals import scale_location_data as scale_location_data
from jaxreml.results.plots.within_subjects import correlation as correlation
from jaxreml.results.plots.within_subjects import correlation_data as correlation_data
from jaxreml.results.plots.within_subjects import semivariogram as semivariogram
from jaxreml.results.plots.within_subjects import semivariogram_data as semivariogram_data
