# Random effects with structured covariances: glmmTMB and nlme.
# Rscript make_random_covariances.R, in this folder. glmmTMB 1.1.5, nlme 3.1-162.
# Data are simulated here, as public ones seldom have several rows in each cell of subject and
# occasion; the file is written for Python. glmmTMB's criterion is at its own optimum.

library(glmmTMB)
library(nlme)
library(jsonlite)

set.seed(21)
groups <- 30
kinds <- 4
data <- expand.grid(rep = 1:2, k = 0:(kinds - 1), g = seq_len(groups))
R <- 0.75^abs(outer(0:3, 0:3, "-"))
sd <- c(1, 1.3, 1.6, 1.2)
L <- t(chol(R * outer(sd, sd)))
b <- t(L %*% matrix(rnorm(kinds * groups), kinds))
data$x <- round(rnorm(nrow(data)), 3)
data$t <- c(0, 1, 2.5, 4)[data$k + 1]
data$s <- c(0, 1.5, 0.5, 2)[data$k + 1]
data$y <- round(2 + 0.5 * data$x + b[cbind(data$g, data$k + 1)] + rnorm(nrow(data)), 4)
data <- data[runif(nrow(data)) > 0.12, ]
data$g <- sprintf("g%02d", data$g)
data$f <- factor(paste0("f", data$k))
data$times <- numFactor(data$t)
data$pos <- numFactor(data$t, data$s)
data$one <- factor(1)
write.csv(data[c("g", "f", "t", "s", "x", "y")], gzfile("random_covariances/simulated.csv.gz"),
          row.names = FALSE)

control <- glmmTMBControl(optCtrl = list(iter.max = 5000, eval.max = 5000, rel.tol = 1e-14))
tight <- function(formula, REML, ...) {
  fit <- glmmTMB(formula, data, REML = REML, control = control, ...)
  for (k in 1:3) { # from the optimum found, with the gradient
    again <- nlminb(fit$fit$par, fit$obj$fn, fit$obj$gr,
                    control = list(iter.max = 2000, eval.max = 4000, rel.tol = 1e-15))
    fit$fit$par <- again$par
    fit$fit$objective <- again$objective
  }
  last <- fit$obj$env$last.par.best
  list(
    criterion = 2 * fit$fit$objective,
    beta = as.numeric(fixef(fit)$cond),
    se = as.numeric(sqrt(diag(vcov(fit)$cond))),
    covariance = unclass(matrix(as.numeric(VarCorr(fit)$cond[[1]]), nrow = nrow(VarCorr(fit)$cond[[1]]))),
    sigma = sigma(fit),
    parameters = as.numeric(fit$fit$par)
  )
}

matern <- function(formula, REML, smoothness) {
  tight(formula, REML, map = list(theta = factor(c(1, 2, NA))),
        start = list(theta = c(0, 0, log(smoothness))))
}

found <- list()
for (REML in c(TRUE, FALSE)) {
  m <- if (REML) "reml" else "ml"
  found[[paste0("diag_", m)]] <- tight(y ~ x + diag(f + 0 | g), REML)
  found[[paste0("cs_", m)]] <- tight(y ~ x + cs(f + 0 | g), REML)
  found[[paste0("ar1_", m)]] <- tight(y ~ x + ar1(f + 0 | g), REML)
  found[[paste0("toep_", m)]] <- tight(y ~ x + toep(f + 0 | g), REML)
  found[[paste0("ou_", m)]] <- tight(y ~ x + ou(times + 0 | g), REML)
  found[[paste0("exp_", m)]] <- tight(y ~ x + exp(pos + 0 | g), REML)
  found[[paste0("gau_", m)]] <- tight(y ~ x + gau(pos + 0 | g), REML)
  found[[paste0("mat_", m)]] <- matern(y ~ x + mat(pos + 0 | g), REML, 1.5)
  found[[paste0("mat5_", m)]] <- matern(y ~ x + mat(pos + 0 | g), REML, 2.5)
  found[[paste0("rr_", m)]] <- tight(y ~ x + rr(f + 0 | g, d = 2), REML)
  found[[paste0("rr1_", m)]] <- tight(y ~ x + rr(f + 0 | g, d = 1), REML)
}

# nlme: lme with classes of covariance matrices
of_lme <- function(fit) {
  list(
    criterion = -2 * as.numeric(logLik(fit)),
    beta = as.numeric(fixef(fit)),
    se = as.numeric(sqrt(diag(fit$varFix))),
    covariance = unclass(matrix(as.numeric(getVarCov(fit)), nrow = nrow(getVarCov(fit)))),
    sigma = fit$sigma
  )
}
settings <- lmeControl(msMaxIter = 2000, msTol = 1e-14, tolerance = 1e-12, maxIter = 500,
                       returnObject = TRUE)
for (method in c("REML", "ML")) {
  m <- tolower(method)
  lm_ <- function(random) of_lme(lme(y ~ x, data, random, method = method, control = settings))
  found[[paste0("pdDiag_", m)]] <- lm_(list(g = pdDiag(~ f + 0)))
  found[[paste0("pdIdent_", m)]] <- lm_(list(g = pdIdent(~ f + 0)))
  found[[paste0("pdCompSymm_", m)]] <- lm_(list(g = pdCompSymm(~ f + 0)))
}
write(toJSON(found, digits = 12, auto_unbox = TRUE, matrix = "rowmajor", pretty = TRUE),
      "random_covariances/fits.json")
