# lme4's side of batched_fits.py and agreement.py: fresh lmer fits of the first responses of a binary
# file, and the time of refit. Reads a task in JSON, writes JSON to stdout.
suppressPackageStartupMessages({library(lme4); library(jsonlite)})
task <- fromJSON(commandArgs(TRUE)[1], simplifyVector = FALSE)
quiet <- function(...) lmerControl(check.conv.singular = "ignore", check.conv.grad = "ignore",
                                   check.conv.hess = "ignore", calc.derivs = FALSE, ...)
default <- quiet()
# The default optimiser stops 1e-6 to 1e-5 early and ignores tighter xtol_abs and ftol_abs.
tight <- quiet(optimizer = "bobyqa", optCtrl = list(rhobeg = 0.2, rhoend = 1e-9, maxfun = 1e5))
clock <- function(f) { t <- proc.time()[[3]]; value <- f(); list(value, proc.time()[[3]] - t) }
out <- lapply(task$models, function(model) {
  data <- read.csv(model$csv, stringsAsFactors = FALSE)
  for (name in names(model$factors)) data[[name]] <- factor(data[[name]], unlist(model$factors[[name]]))
  count <- max(model$fits, model$refits)
  y <- matrix(readBin(model$responses, "double", nrow(data) * count), nrow(data))  # one column each
  formula <- as.formula(paste("y", model$formula))
  data$y <- y[, 1]
  one <- function(i, control, start = NULL) {
    data$y <- y[, i]
    lmer(formula, data, control = control, start = start)
  }
  rows <- seq_len(model$fits)
  fitted <- clock(function() lapply(rows, function(i) {
    fit <- one(i, default)
    list(REMLcrit(fit), getME(fit, "theta"))
  }))
  fits <- lapply(rows, function(i) one(i, tight, fitted[[1]][[i]][[2]]))
  column <- function(f) I(lapply(fits, function(fit) unname(f(fit))))
  start <- one(1, default)
  refitted <- clock(function() for (i in seq_len(model$refits)) refit(start, y[, i]))
  list(default = I(vapply(fitted[[1]], function(fit) fit[[1]], 0)), tight = I(vapply(fits, REMLcrit, 0)),
       beta = column(fixef), se = column(function(fit) sqrt(diag(as.matrix(vcov(fit))))),
       lmer_us = fitted[[2]] / max(model$fits, 1) * 1e6,
       refit_us = refitted[[2]] / max(model$refits, 1) * 1e6)
})
names(out) <- sapply(task$models, function(model) model$name)
cat(toJSON(list(results = out, version = as.character(packageVersion("lme4"))), auto_unbox = TRUE,
           digits = NA))
