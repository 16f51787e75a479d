# lme4's side of single_fits.py: reads models from JSON on the command line, writes JSON to stdout.
suppressPackageStartupMessages({library(lme4); library(jsonlite)})
task <- fromJSON(commandArgs(TRUE)[1], simplifyVector = FALSE)
control <- lmerControl(check.conv.singular = "ignore")
median_ms <- function(f, n) { f(); median(replicate(n, { t <- proc.time()[[3]]; for (i in 1:5) f()
  (proc.time()[[3]] - t) / 5 })) * 1e3 }
out <- lapply(task$models, function(model) {
  data <- read.csv(model$csv, stringsAsFactors = FALSE)
  for (name in names(model$factors)) data[[name]] <- factor(data[[name]], unlist(model$factors[[name]]))
  formula <- as.formula(model$formula)
  fit <- lmer(formula, data, control = control)
  y <- getME(fit, "y")
  list(criterion = REMLcrit(fit), fit = median_ms(function() lmer(formula, data, control = control), task$n),
       refit = median_ms(function() refit(fit, y), task$n))
})
names(out) <- sapply(task$models, function(model) model$name)
cat(toJSON(list(results = out, version = as.character(packageVersion("lme4"))), auto_unbox = TRUE, digits = 12))
