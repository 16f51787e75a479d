# lme4's side of laboratories.py: a loop over the columns of a matrix, as weights or as a covariate.
suppressPackageStartupMessages({library(lme4); library(jsonlite)})
task <- fromJSON(commandArgs(TRUE)[1], simplifyVector = FALSE)
data <- read.csv(task$csv, stringsAsFactors = FALSE)
own <- as.matrix(read.csv(task$own, check.names = FALSE))
responses <- as.matrix(read.csv(task$responses, check.names = FALSE))
# lmer's default stops where t is known to 1e-4; `close` goes on for the comparison.
close <- lmerControl(optCtrl = list(ftol_abs = 1e-14, xtol_abs = 1e-12, maxeval = 1e4))
fit <- function(k, control = lmerControl()) {
  data$y <<- responses[, min(k, ncol(responses))]
  if (task$weights) lmer(as.formula(task$formula), data, weights = own[, k], control = control)
  else { data$X <<- own[, k]; lmer(as.formula(task$formula), data, control = control) }
}
if (task$tests) {  # dream's: Satterthwaite's t of every coefficient
  suppressPackageStartupMessages(library(lmerTest))
  tests <- function(k, ...) suppressMessages(suppressWarnings(coef(summary(fit(k, ...)))))
  took <- system.time(for (k in seq_len(ncol(own))) tests(k))[[3]]
  found <- lapply(seq_len(ncol(own)), tests, control = close)
  cat(toJSON(list(seconds = took, t = t(sapply(found, function(f) f[, "t value"])),
                  df = t(sapply(found, function(f) f[, "df"])),
                  version = as.character(packageVersion("lme4"))), digits = 14, auto_unbox = TRUE))
  quit()
}
criterion <- numeric(ncol(own))
invisible(suppressMessages(fit(1)))
took <- system.time(for (k in seq_len(ncol(own)))
  criterion[k] <- suppressMessages(suppressWarnings(REMLcrit(fit(k)))))[[3]]
cat(toJSON(list(seconds = took, criterion = criterion,
                version = as.character(packageVersion("lme4"))), auto_unbox = TRUE, digits = 14))
