# Writes tests/reference/residuals/own_times.csv.gz and own_times.json: residuals at times of each
# subject's own by nlme's gls and lme, of made-up data: 40 subjects with 1 to 12 rows.
# Run from the repository root:
#   Rscript tests/reference/make_own_times.R
# Made with R 4.2.2, nlme 3.1-162, jsonlite 1.8.4.
suppressPackageStartupMessages({library(nlme); library(jsonlite)})
here <- "tests/reference/residuals"
set.seed(5)
parts <- lapply(1:40, function(j) {
  n <- if (j == 1) 1 else sample(2:12, 1)
  t <- round(sort(runif(n, 0, 10)), 4)
  R <- exp(-abs(outer(t, t, "-")) / 1.5)
  e <- 2 * as.vector(t(chol(R)) %*% rnorm(n)) + rnorm(1)
  data.frame(subject = sprintf("s%02d", j), t = t, x = rnorm(n), e = e)
})
d <- do.call(rbind, parts)
d$y <- round(1 + 0.5 * d$x + 0.1 * d$t + d$e, 6)
d$x <- round(d$x, 6)
d$e <- NULL
d <- d[sample(nrow(d)), ]
file <- gzfile(file.path(here, "own_times.csv.gz"), "w")
write.csv(d, file, row.names = FALSE)
close(file)
d <- d[order(d$subject, d$t), ]
d$k <- ave(d$t, d$subject, FUN = seq_along)
exact <- glsControl(tolerance = 1e-10, msTol = 1e-12, opt = "nlminb", maxIter = 500, msMaxIter = 500)
exact_lme <- lmeControl(tolerance = 1e-10, msTol = 1e-12, maxIter = 500, msMaxIter = 500)
on <- ~ t | subject
fit <- function(correlation, method = "REML")
  gls(y ~ x + t, d, correlation = correlation, method = method, control = exact)
mixed <- function(correlation)
  lme(y ~ x + t, d, random = ~ 1 | subject, correlation = correlation, control = exact_lme)
fits <- list(sp_exp = fit(corExp(form = on)), sp_gau = fit(corGaus(form = on)),
             sp_exp_ml = fit(corExp(form = on), "ML"), car1 = fit(corCAR1(form = on)),
             sp_exp_random = mixed(corExp(form = on)), sp_gau_random = mixed(corGaus(form = on)))
of <- function(m) {
  random <- inherits(m, "lme")
  list(criterion = -2 * as.numeric(logLik(m)), beta = unname(if (random) fixef(m) else coef(m)),
       se = unname(sqrt(diag(vcov(m)))), sigma = m$sigma,
       range = unname(coef(m$modelStruct$corStruct, unconstrained = FALSE)),
       random = if (random) as.numeric(VarCorr(m)[1, 1]) else NULL,
       normalized = unname(resid(m, type = "normalized")))
}
write(toJSON(lapply(fits, of), digits = NA, auto_unbox = TRUE, pretty = TRUE, null = "null"),
      file.path(here, "own_times.json"))
