# R's side of first_use.py: reads models from JSON on the command line, writes JSON to stdout.
suppressPackageStartupMessages({library(lmerTest); library(jsonlite)})
task <- fromJSON(commandArgs(TRUE)[1], simplifyVector = FALSE)
control <- lmerControl(check.conv.singular = "ignore")
now <- function() as.numeric(Sys.time())
out <- lapply(task$models, function(model) {
  data <- read.csv(model$csv, stringsAsFactors = FALSE)
  for (name in names(model$factors)) data[[name]] <- factor(data[[name]], unlist(model$factors[[name]]))
  formula <- as.formula(model$formula)
  begin <- now()
  fit <- lmer(formula, data, control = control)
  fitted <- now() - begin
  invisible(capture.output(print(summary(fit)), print(coef(summary(fit, ddf = "Kenward-Roger")))))
  whole <- now() - begin
  begin <- now()
  lmer(formula, data, control = control)
  list(criterion = REMLcrit(fit), fit = fitted, all = whole, again = now() - begin)
})
cat(toJSON(list(models = out, version = as.character(packageVersion("lme4"))), auto_unbox = TRUE, digits = 12))
