# lme4's side of bootstrap.py: reads a task in JSON, writes JSON to stdout.
suppressPackageStartupMessages({library(lme4); library(jsonlite)})
task <- fromJSON(commandArgs(TRUE)[1], simplifyVector = FALSE)
data <- read.csv(task$csv, stringsAsFactors = FALSE)
for (name in names(task$factors)) data[[name]] <- factor(data[[name]], unlist(task$factors[[name]]))
fit <- lmer(as.formula(task$formula), data)
statistic <- function(f) c(fixef(f), sigma(f), as.data.frame(VarCorr(f))$sdcor[1:3])
seconds <- function() system.time(made <<- suppressMessages(suppressWarnings(
  bootMer(fit, statistic, nsim = task$n))))
invisible(seconds())
times <- sapply(seq_len(task$repeats), function(i) { t <- seconds(); c(t[[3]], t[[1]] + t[[2]]) })
out <- list(wall = apply(times, 1, median)[1], cpu = apply(times, 1, median)[2],
            std_error = unname(apply(made$t, 2, sd, na.rm = TRUE)),
            version = as.character(packageVersion("lme4")))
cat(toJSON(out, auto_unbox = TRUE, digits = 12))
