# Writes tests/reference/batches/moderation.json: limma's fitFDist, fitFDistRobustly and squeezeVar
# of simulated variances, eBayes of a small linear model, and pi0 and q-values by the qvalue package.
# Run from the repository root:
#   Rscript tests/reference/make_moderation.R
# Made with R 4.2.2, limma 3.54.1, statmod 1.5.0, qvalue 2.30.0.
suppressPackageStartupMessages({ library(limma); library(qvalue); library(jsonlite) })
set.seed(19)

case <- function(variance, df, covariate = NULL) {
  out <- list(variance = variance, df = df, covariate = covariate)
  for (robust in c(FALSE, TRUE)) {
    found <- squeezeVar(variance, df, covariate = covariate, robust = robust)
    out[[if (robust) "robust" else "simple"]] <- list(
      df_prior = rep_len(found$df.prior, length(variance)),
      variance_prior = rep_len(found$var.prior, length(variance)),
      variance_post = found$var.post)
  }
  out
}
n <- 60
mean <- runif(n, 2, 12)
varied <- 0.3 * 5 / rchisq(n, 5)                   # around a prior with 5 degrees of freedom
rdf <- runif(n, 8, 20)                             # of mixed models: no two are equal
drawn <- function(prior, df) prior * rchisq(n, df) / df
trended <- exp(-0.3 * mean + 0.02 * mean^2) * 12 / rchisq(n, 12)
outlying <- drawn(0.3 * 12 / rchisq(n, 12), rdf); outlying[1:4] <- outlying[1:4] * c(30, 60, 1e3, 5)
few <- 1:12
cases <- list(
  constant = case(drawn(varied, 10), rep(10, n)),
  unequal = case(drawn(varied, rdf), rdf),
  trend = case(drawn(trended, rdf), rdf, mean),
  few_with_trend = case(drawn(trended, rdf)[few], rdf[few], mean[few]),
  alike = case(drawn(rep(0.7, n), rdf) * 1e-3 + 0.7, rdf),   # less spread than chance
  alike_with_trend = case((drawn(rep(0.7, n), rdf) * 1e-3 + 0.7) * exp(mean / 10), rdf, mean),
  chance_with_outlier = { v <- drawn(rep(0.7, n), rdf); v[1] <- 30; case(v, rdf) },
  alike_with_outlier = { v <- drawn(rep(0.7, n), rdf) * 1e-3 + 0.7; v[1] <- 30; case(v, rdf) },
  far_outlier = { v <- drawn(0.3 * 40 / rchisq(n, 40), rdf * 20); v[2] <- 1e30; case(v, rdf * 20) },
  outliers = case(outlying, rdf),
  outliers_equal_df = case(outlying, rep(10, n)),
  outliers_with_trend = case(outlying * exp(-0.3 * mean), rdf, mean),
  zeros = case(c(0, 1e-9, drawn(varied, rdf)[-(1:2)]), rdf))

# eBayes of a linear model: what moderated t come to where residual degrees of freedom are n - p.
x <- rep(0:1, each = 6)
y <- matrix(rnorm(40 * 12, sd = sqrt(rep(0.5 * 6 / rchisq(40, 6), 12))), 40) + outer(rnorm(40), x)
fit <- eBayes(lmFit(y, cbind(one = 1, x = x)))
cases <- list(squeezed = cases, linear = list(
  estimate = fit$coefficients[, 2], se = fit$stdev.unscaled[, 2] * fit$sigma, sigma = fit$sigma,
  df = fit$df.residual, df_prior = fit$df.prior, t = fit$t[, 2], p = fit$p.value[, 2],
  df_total = fit$df.total))

p <- c(runif(300), rbeta(120, 0.2, 6), NA)
qvalues <- lapply(c(smoother = "smoother", bootstrap = "bootstrap"), function(method) {
  found <- qvalue(p, pi0.method = method, lfdr.out = FALSE)
  list(pi0 = found$pi0, q = found$qvalues)
})
cases$q_values <- c(list(p = p, adjusted = p.adjust(p, "BH")), qvalues)
text <- toJSON(cases, digits = NA, auto_unbox = TRUE, na = "string", null = "null", pretty = FALSE)
writeLines(text, "tests/reference/batches/moderation.json")
