suppressPackageStartupMessages({library(lme4); library(jsonlite)})
task <- fromJSON(commandArgs(trailingOnly = TRUE)[1], simplifyVector = FALSE)
results <- lapply(task$models, function(model) {
  data <- read.csv(model$csv)
  for (name in names(model$factors))
    data[[name]] <- factor(data[[name]], levels = unlist(model$factors[[name]]))
  fit <- lmer(as.formula(model$formula), data, REML = FALSE)
  intervals <- function()
    suppressWarnings(confint(fit, method = "profile", oldNames = FALSE, quiet = TRUE))
  found <- intervals()
  times <- replicate(task$n, system.time(intervals())[["elapsed"]])
  list(name = model$name, lower = unname(found[, 1]), upper = unname(found[, 2]),
       ms = 1000 * median(times))
})
cat(toJSON(list(results = results, lme4 = as.character(packageVersion("lme4"))),
           auto_unbox = TRUE, digits = NA))
