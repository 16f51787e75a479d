# lme4's side of laboratories.py: a loop over the columns of a matrix, as weights or as a covariate.
suppressPackageStartupMessages({library(lme4); library(jsonlite)})
task <- fromJSON(commandArgs(TRUE)[1], simplifyVector = FALSE)
data <- read.csv(task$csv, stringsAsFactors = FALSE)
own <- as.matrix(read.csv(task$own, check.names = FALSE))
responses <- as.matrix(read.csv(task$responses, check.names = FALSE))
fit <- function(k) {
  data$y <<- responses[, min(k, ncol(responses))]
  if (task$weights) lmer(as.formula(task$formula), data, weights = own[, k])
  else { data$X <<- own[, k]; lmer(as.formula(task$formula), data) }
}
criterion <- numeric(ncol(own))
invisible(suppressMessages(fit(1)))
took <- system.time(for (k in seq_len(ncol(own)))
  criterion[k] <- suppressMessages(suppressWarnings(REMLcrit(fit(k)))))[[3]]
cat(toJSON(list(seconds = took, criterion = criterion,
                version = as.character(packageVersion("lme4"))), auto_unbox = TRUE, digits = 14))
