"""The former home of `model_frame`; new code imports it from `jaxreml.data.frame`."""

from jaxreml.data.frame import model_frame as model_frame
