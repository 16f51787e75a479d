# Writes tests/reference/inference/delta.json: R2 and ICC by the performance package and by formula,
# and standard errors of SDs and correlations from glmmTMB's full covariance matrix.
# Run from the repository root:
#   Rscript tests/reference/make_delta.R
# Made with R 4.2.2, lme4 1.1-31, glmmTMB 1.1.5, performance 0.10.2, insight 0.19.0, numDeriv.
suppressPackageStartupMessages({
  library(lme4); library(glmmTMB); library(performance); library(jsonlite)
})
control <- lmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9, maxfun = 1e5),
                       check.conv.singular = "ignore")
csv <- function(name) {
  frame <- read.csv(gzfile(file.path("tests/reference", paste0(name, ".csv.gz"))))
  frame[] <- lapply(frame, function(x) if (is.character(x)) factor(x) else x)
  frame
}
model <- function(formula, data, ...) list(formula = formula, data = as.data.frame(data), ...)
models <- list(
  sleep_corr = model(Reaction ~ Days + (Days|Subject), lme4::sleepstudy),
  sleep_int = model(Reaction ~ Days + (1|Subject), lme4::sleepstudy),
  # insight 0.19.0 counts the first of the two terms on Subject twice
  sleep_unc = model(Reaction ~ Days + (Days||Subject), lme4::sleepstudy, package = FALSE),
  pastes = model(strength ~ 1 + (1|batch/cask), lme4::Pastes),
  machines = model(score ~ Machine + (1|Worker) + (1|Worker:Machine), nlme::Machines),
  machines_s = model(score ~ Machine + (0+Machine|Worker), nlme::Machines, package = FALSE),
  orthodont = model(distance ~ age*Sex + (age|Subject), nlme::Orthodont),
  q4 = model(y ~ x1 + x2 + x3 + (x1 + x2 + x3|g), csv("q4")),
  weights_offset = model(y ~ x + offset(o) + (x|g), csv("weights_offset"), weights = "w",
                         package = FALSE),
  crossed_nested = model(y ~ x + (x|item) + (1|site) + (1|subject) + (1|subject:session),
                         csv("crossed_nested")))

# Nakagawa, Johnson and Schielzeth (2017), Johnson (2014): mean of z' Sigma z over the rows, and the
# variance of X beta over the rows.
by_formula <- function(fit) {
  terms <- getME(fit, "mmList"); blocks <- VarCorr(fit)
  random <- mapply(function(Z, Sigma) mean(rowSums((Z %*% Sigma) * Z)), terms, blocks)
  fixed <- var(drop(getME(fit, "X") %*% fixef(fit))); residual <- sigma(fit)^2
  total <- fixed + sum(random) + residual
  list(random = as.list(setNames(random, names(blocks))), fixed = fixed, residual = residual,
       marginal = fixed / total, conditional = (fixed + sum(random)) / total,
       icc = sum(random) / (sum(random) + residual))
}

by_package <- function(fit) {
  r2 <- r2_nakagawa(fit)
  list(marginal = unname(r2$R2_marginal), conditional = unname(r2$R2_conditional),
       icc = icc(fit)$ICC_adjusted)
}

# SDs, correlations (lme4's order) and the residual SD as functions of glmmTMB's parameters.
tmb_start <- function(V) {
  q <- ncol(V); L <- t(chol(cov2cor(V))); L <- L / diag(L)
  c(log(sqrt(diag(V))), unlist(lapply(seq_len(q)[-1], function(i) L[i, seq_len(i - 1)])))
}
read_off <- function(par, sizes) {
  out <- c(); at <- 1  # betad first
  for (q in sizes) {
    sd <- exp(par[at + seq_len(q)]); at <- at + q
    L <- diag(q)
    if (q > 1) for (i in 2:q) { L[i, seq_len(i - 1)] <- par[at + seq_len(i - 1)]; at <- at + i - 1 }
    R <- cov2cor(tcrossprod(L)); diag(R) <- sd
    out <- c(out, R[lower.tri(R, diag = TRUE)])
  }
  c(out, exp(par[1] / 2))
}
standard_errors <- function(spec, fit) {
  blocks <- VarCorr(fit); sizes <- vapply(blocks, ncol, 0)
  start <- list(beta = unname(fixef(fit)), betad = 2 * log(sigma(fit)),
                theta = unlist(lapply(blocks, tmb_start), use.names = FALSE))
  other <- suppressWarnings(glmmTMB(spec$formula, spec$data, REML = TRUE, start = start,
    control = glmmTMBControl(optCtrl = list(iter.max = 1e4, eval.max = 1e4, rel.tol = 1e-14))))
  stopifnot(isTRUE(other$sdr$pdHess), abs(logLik(other) - logLik(fit)) < 1e-5)
  keep <- names(other$sdr$par.fixed) != "beta"  # under REML beta is integrated out
  par <- other$sdr$par.fixed[keep]; V <- other$sdr$cov.fixed[keep, keep]
  stopifnot(names(par)[1] == "betad")
  J <- numDeriv::jacobian(read_off, par, sizes = sizes)
  list(value = read_off(par, sizes), se = sqrt(diag(J %*% V %*% t(J))))
}

result <- lapply(names(models), function(name) {
  spec <- models[[name]]
  args <- list(spec$formula, data = spec$data, control = control)
  if (!is.null(spec$weights)) args$weights <- spec$data[[spec$weights]]
  fit <- suppressMessages(do.call(lmer, args))
  out <- list(formula = by_formula(fit))
  if (!isFALSE(spec$package)) out$performance <- suppressWarnings(by_package(fit))
  if (name %in% c("sleep_corr", "machines_s", "q4", "orthodont")) out$glmmTMB <- standard_errors(spec, fit)
  out$names <- rownames(suppressWarnings(confint(fit, method = "Wald", oldNames = FALSE)))
  out$names <- head(out$names, length(out$names) - length(fixef(fit)))
  cat(name, "\n"); str(out)
  out
})
names(result) <- names(models)
writeLines(toJSON(result, digits = NA, auto_unbox = TRUE), "tests/reference/inference/delta.json")
