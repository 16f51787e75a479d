# R's side of degrees_of_freedom.py: reads a task in JSON on the command line, writes JSON to stdout.
suppressPackageStartupMessages({library(lme4); library(lmerTest); library(pbkrtest); library(jsonlite)})
task <- fromJSON(commandArgs(TRUE)[1], simplifyVector = FALSE)
clock <- function(f) system.time(value <- f())[[3]]
quiet <- lmerControl(check.conv.singular = "ignore")
read <- function(model) {
  data <- read.csv(model$csv, stringsAsFactors = FALSE)
  for (name in names(model$factors)) data[[name]] <- factor(data[[name]], unlist(model$factors[[name]]))
  data
}
out <- list(version = as.character(packageVersion("lme4")))
for (name in names(task$models)) {
  model <- task$models[[name]]; data <- read(model)
  fit <- suppressMessages(lme4::lmer(as.formula(model$formula), data, control = quiet))
  got <- list()
  if ("satterthwaite" %in% model$work) {
    # as summary() does it: the derivatives, then the table
    got$satterthwaite <- clock(function() coef(summary(as_lmerModLmerTest(fit))))
  }
  if ("kr" %in% model$work)
    got$kr <- clock(function() { vcovAdj(fit); contest(as_lmerModLmerTest(fit), diag(length(fixef(fit))),
                                                       joint = FALSE, ddf = "Kenward-Roger") })
  if ("kr vcov" %in% model$work) got$kr <- clock(function() vcovAdj(fit))
  out[[name]] <- if (length(got)) got else NULL
}
cat(toJSON(out, auto_unbox = TRUE, digits = 8))
