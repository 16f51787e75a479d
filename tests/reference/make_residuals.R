# Writes tests/reference/residuals/nlme.json: fits with a covariance of residuals by nlme's gls and
# lme, of the FEV1 data of R's mmrm (openpharma/mmrm, Apache 2.0; fev.csv.gz) and of Orthodont.
# Run from the repository root:
#   Rscript tests/reference/make_residuals.R
# Made with R 4.2.2, nlme 3.1-162, jsonlite 1.8.4.
suppressPackageStartupMessages({library(nlme); library(jsonlite)})
here <- "tests/reference/residuals"
fev <- read.csv(gzfile(file.path(here, "fev.csv.gz")))
fev <- fev[!is.na(fev$FEV1), ]
for (name in c("RACE", "ARMCD", "AVISIT", "USUBJID", "SEX")) fev[[name]] <- factor(fev[[name]])
fev$V <- as.integer(fev$AVISIT)
fev <- fev[order(fev$USUBJID, fev$V), ]
each <- varIdent(form = ~ 1 | AVISIT)
exact <- glsControl(tolerance = 1e-10, msTol = 1e-12, opt = "nlminb", maxIter = 500, msMaxIter = 500)
exact_lme <- lmeControl(tolerance = 1e-10, msTol = 1e-12, maxIter = 500, msMaxIter = 500)
fit <- function(correlation = NULL, weights = NULL, method = "REML")
  gls(FEV1 ~ ARMCD + AVISIT, fev, correlation = correlation, weights = weights, method = method,
      control = exact)
on <- ~ V | USUBJID
fits <- list(
  us = fit(corSymm(form = on), each), cs = fit(corCompSymm(form = on)),
  csh = fit(corCompSymm(form = on), each), ar1 = fit(corAR1(form = on)),
  ar1h = fit(corAR1(form = on), each), diag = fit(NULL, each), sp_exp = fit(corExp(form = on)),
  sp_gau = fit(corGaus(form = on)), us_ml = fit(corSymm(form = on), each, "ML"),
  ar1_ml = fit(corAR1(form = on), method = "ML"),
  ar1_weights = fit(corAR1(form = on), varFixed(~ 1 / WEIGHT)),
  ar1_random = lme(FEV1 ~ ARMCD + AVISIT, fev, random = ~ 1 | USUBJID, control = exact_lme,
                   correlation = corAR1(form = on)))
of <- function(m) {
  mixed <- inherits(m, "lme")
  first <- levels(fev$USUBJID)[table(fev$USUBJID) == 4][1]
  sigma <- getVarCov(m, individual = first, type = if (mixed) "conditional" else NULL)
  list(criterion = -2 * as.numeric(logLik(m)), beta = unname(if (mixed) fixef(m) else coef(m)),
       se = unname(sqrt(diag(vcov(m)))), normalized = unname(head(resid(m, type = "normalized"), 20)),
       covariance = if (mixed) unname(as.matrix(sigma[[1]])) else unname(unclass(sigma)),
       random = if (mixed) as.numeric(VarCorr(m)[1, 1]) else NULL)
}
# getVarCov of gls with prior weights is not that of weight one
record <- lapply(names(fits), function(name) tryCatch(of(fits[[name]]), error = function(e) {
  m <- fits[[name]]
  list(criterion = -2 * as.numeric(logLik(m)), beta = unname(coef(m)), se = unname(sqrt(diag(vcov(m)))))
}))
names(record) <- names(fits)
write(toJSON(record, digits = NA, auto_unbox = TRUE, pretty = TRUE, null = "null"),
      file.path(here, "nlme.json"))

# Degrees of freedom between and within groups: fixDF of lme, in tests/inference/test_between_within.py
o <- Oxide
o$x <- as.numeric(o$Site)
o$w <- as.numeric(o$Wafer)
print(lme(Thickness ~ Source + x + w, o, random = ~ 1 | Lot/Wafer)$fixDF$X)
print(lme(distance ~ age * Sex, Orthodont, random = ~ 1 | Subject)$fixDF$X)
