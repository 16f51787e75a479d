# nlme's and glmmTMB's side of residuals.py: reads a task from JSON on the command line, writes JSON.
suppressPackageStartupMessages({library(nlme); library(glmmTMB); library(jsonlite)})
task <- fromJSON(commandArgs(TRUE)[1], simplifyVector = FALSE)
data <- read.csv(task$csv, stringsAsFactors = TRUE)
data$v <- if (task$model %in% c("corExp", "corGaus")) data$visit else as.integer(data$visit)
data <- data[order(data$subject, data$v), ]
fixed <- as.formula(task$formula)
timed <- function(f) {
  fit <- NULL
  took <- system.time(fit <- f())
  seconds <- if (isTRUE(task$cpu)) took[[1]] + took[[2]] else took[[3]]
  list(seconds = seconds, criterion = -2 * as.numeric(logLik(fit)))
}
out <- list()
if (nzchar(task$beside)) {
  if ("lme" %in% task$peers)
    out$lme <- timed(function() lme(fixed, data, random = ~ 1 | site, correlation = corSymm(form = ~ v | site/subject),
                                    weights = varIdent(form = ~ 1 | visit), control = lmeControl(msMaxIter = 500, maxIter = 500)))
  if ("glmmTMB" %in% task$peers)
    out$glmmTMB <- timed(function() glmmTMB(as.formula(paste0(task$formula, task$beside, " + ", task$model, "(0 + visit | subject)")),
                                            data, dispformula = ~ 0, REML = TRUE))
} else if (task$model == "us") {
  if ("gls" %in% task$peers)
    out$gls <- timed(function() gls(fixed, data, correlation = corSymm(form = ~ v | subject),
                                    weights = varIdent(form = ~ 1 | visit), control = glsControl(msMaxIter = 500, maxIter = 200)))
  if ("glmmTMB" %in% task$peers)
    out$glmmTMB <- timed(function() glmmTMB(update(fixed, . ~ . + us(0 + visit | subject)), data,
                                            dispformula = ~ 0, REML = TRUE))
} else if (task$model %in% c("corExp", "corGaus", "corAR1")) {
  # lme stops far above the optimum unless it is told where to start
  of <- if (task$random) corExp(5, form = ~ v | subject) else get(task$model)(form = ~ v | subject)
  if (task$random) out$lme <- timed(function() lme(fixed, data, random = ~ 1 | subject, correlation = of))
  else out$gls <- timed(function() gls(fixed, data, correlation = of))
} else {
  if ("lme" %in% task$peers) out$lme <- timed(function() lme(fixed, data, random = ~ 1 | subject, correlation = corAR1(form = ~ v | subject)))
  if ("glmmTMB" %in% task$peers) out$glmmTMB <- timed(function() glmmTMB(update(fixed, . ~ . + (1 | subject) + ar1(0 + visit | subject)), data,
                                          dispformula = ~ 0, REML = TRUE))
}
cat(toJSON(list(results = out, nlme = as.character(packageVersion("nlme")),
                glmmTMB = as.character(packageVersion("glmmTMB"))), auto_unbox = TRUE, digits = 12))
