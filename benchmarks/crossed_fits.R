# lme4's side of crossed_fits.py: reads a task from JSON on the command line, writes JSON to stdout.
suppressPackageStartupMessages({library(lme4); library(jsonlite)})
task <- fromJSON(commandArgs(TRUE)[1], simplifyVector = FALSE)
control <- lmerControl(check.conv.singular = "ignore")
data <- read.csv(task$csv, stringsAsFactors = FALSE)
for (name in names(task$factors)) data[[name]] <- factor(data[[name]], unlist(task$factors[[name]]))
out <- lapply(task$models, function(formula) {
  fit <- NULL
  seconds <- replicate(task$n, system.time(fit <<- lmer(as.formula(formula), data, control = control))[[3]])
  list(criterion = REMLcrit(fit), fit = median(seconds))
})
names(out) <- names(task$models)
cat(toJSON(list(results = out, version = as.character(packageVersion("lme4"))), auto_unbox = TRUE, digits = 12))
