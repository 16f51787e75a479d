# Writes tests/reference/residuals/beside.csv.gz and beside.json: covariances of residuals beside
# random effects of other factors, by nlme's lme (nested factors) and glmmTMB (crossed ones).
# Run from the repository root:
#   Rscript tests/reference/make_beside.R
# Made with R 4.2.2, nlme 3.1-162, glmmTMB 1.1.5, jsonlite 1.8.4.
suppressPackageStartupMessages({library(nlme); library(glmmTMB); library(jsonlite)})
here <- "tests/reference/residuals"
set.seed(20261127)
subjects <- 72; visits <- 4; sites <- 12
d <- expand.grid(v = 1:visits, s = 1:subjects)
d$site <- sprintf("c%02d", (d$s - 1) %% sites + 1)
d$subject <- sprintf("p%02d", d$s)
d$arm <- ifelse(d$s %% 5 < 2, "new", "old")
d$visit <- paste0("v", d$v)
d$item <- sprintf("i%d", sample(9, nrow(d), replace = TRUE))
d$x <- round(rnorm(nrow(d)), 3)
d$w <- round(runif(nrow(d), 0.5, 2), 2)
R <- 0.6^abs(outer(1:visits, 1:visits, "-")) * outer(c(1, 1.2, 1.5, 1.7), c(1, 1.2, 1.5, 1.7))
e <- as.vector(t(matrix(rnorm(subjects * visits), subjects) %*% chol(R)))
d$y <- round(10 + d$x + 0.4 * d$v * (d$arm == "new") + 1.2 * rnorm(sites)[(d$s - 1) %% sites + 1] +
  0.8 * rnorm(subjects)[d$s] + 0.9 * rnorm(9)[as.integer(substr(d$item, 2, 2))] + e, 3)
d <- d[runif(nrow(d)) > 0.12, setdiff(names(d), "s")]
write.csv(d, gzfile(file.path(here, "beside.csv.gz")), row.names = FALSE)
for (name in c("site", "subject", "arm", "visit", "item")) d[[name]] <- factor(d[[name]])

exact <- lmeControl(tolerance = 1e-11, msTol = 1e-13, maxIter = 1000, msMaxIter = 1000,
                    opt = "nlminb", niterEM = 50)
each <- varIdent(form = ~ 1 | visit)
on <- ~ v | site/subject
by_nlme <- function(random, correlation = NULL, weights = NULL, method = "REML") {
  m <- lme(y ~ arm * visit + x, d, random = random, correlation = correlation, weights = weights,
           method = method, control = exact)
  V <- VarCorr(m)
  list(criterion = -2 * as.numeric(logLik(m)), beta = unname(fixef(m)),
       se = unname(sqrt(diag(vcov(m)))), sigma = m$sigma,
       random = suppressWarnings(as.numeric(V[rownames(V) == "(Intercept)", 1])),
       correlation = if (is.null(correlation)) NULL else
         unname(coef(m$modelStruct$corStruct, unconstrained = FALSE)),
       ratios = if (is.null(weights) || !inherits(weights, "varIdent")) NULL else
         as.list(coef(m$modelStruct$varStruct, unconstrained = FALSE, allCoef = TRUE)),
       blups = unname(ranef(m, level = 1)[["(Intercept)"]]))
}
tight <- glmmTMBControl(optCtrl = list(iter.max = 5000, eval.max = 5000, rel.tol = 1e-12))
# Without standard errors: those of glmmTMB under REML contain the variances' uncertainty.
by_tmb <- function(formula, disp = ~ 0, REML = TRUE) {
  m <- glmmTMB(formula, d, dispformula = disp, REML = REML, control = tight)
  V <- VarCorr(m)$cond
  list(criterion = -2 * as.numeric(logLik(m)), beta = unname(fixef(m)$cond),
       variances = lapply(V, function(own) unname(diag(as.matrix(own)))),
       dispersion = if (identical(disp, ~ 0)) NULL else as.list(fixef(m)$disp))
}
set.seed(1)
record <- list(
  ar1_nested = by_nlme(~ 1 | site/subject, corAR1(form = on)),
  ar1_site = by_nlme(~ 1 | site, corAR1(form = on)),
  ar1_site_ml = by_nlme(~ 1 | site, corAR1(form = on), method = "ML"),
  ar1h_site = by_nlme(~ 1 | site, corAR1(form = on), each),
  us_site = by_nlme(~ 1 | site, corSymm(form = on), each),
  cs_site = by_nlme(~ 1 | site, corCompSymm(form = on)),
  sp_exp_site = by_nlme(~ 1 | site, corExp(form = on)),
  ar1_site_weights = by_nlme(~ 1 | site, corAR1(form = on), varFixed(~ 1 / w)),
  diag_nested = by_nlme(~ 1 | site/subject, NULL, varIdent(form = ~ 1 | arm)),
  diag_nested_ml = by_nlme(~ 1 | site/subject, NULL, varIdent(form = ~ 1 | arm), "ML"),
  us_item_tmb = by_tmb(y ~ arm * visit + x + (1 | item) + us(0 + visit | subject)),
  ar1_item_site_tmb = by_tmb(y ~ arm * visit + x + (1 | item) + (1 | site) + ar1(0 + visit | subject)),
  diag_crossed_tmb = by_tmb(y ~ arm * visit + x + (1 | item) + (1 | subject), ~ arm))
write(toJSON(record, digits = NA, auto_unbox = TRUE, pretty = TRUE, null = "null"),
      file.path(here, "beside.json"))
