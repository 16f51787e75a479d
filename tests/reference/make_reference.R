# Writes tests/reference/<model>.json (and .csv.gz where the data are not bundled with jaxreml).
# Run from the repository root:
#   Rscript tests/reference/make_reference.R             all models
#   Rscript tests/reference/make_reference.R cake q4     some
# Made with R 4.2.2, lme4 1.1-31, lmerTest 3.1-3, pbkrtest 0.5.2, glmmTMB 1.1.5, mlmRev.
# README.md beside this file explains the keys.
suppressPackageStartupMessages({
  library(lme4); library(lmerTest); library(pbkrtest); library(glmmTMB); library(jsonlite)
})
here <- "tests/reference"
control <- lmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9, maxfun = 1e5),
                       check.conv.singular = "ignore", check.rankX = "message+drop.cols")

# -- the models of the literature, on bundled data ------------------------------------------------
cake_unordered <- transform(lme4::cake, temperature = factor(temperature, ordered = FALSE))
exam <- mlmRev::Exam[c("school", "normexam", "standLRT", "sex")]
model <- function(formula, data, dataset, package, file = NULL, ...)
  list(formula = formula, data = as.data.frame(data), dataset = dataset, package = package,
       file = file, ...)
models <- list(
  cake = model(angle ~ recipe*temp + (1|recipe:replicate), lme4::cake, "cake", "lme4"),
  dyestuff = model(Yield ~ 1 + (1|Batch), lme4::Dyestuff, "Dyestuff", "lme4", profile = TRUE),
  dyestuff2 = model(Yield ~ 1 + (1|Batch), lme4::Dyestuff2, "Dyestuff2", "lme4"),
  exam = model(normexam ~ standLRT + sex + (standLRT|school), exam, "Exam", "mlmRev",
               file = "exam", kr = FALSE),
  insteval = model(y ~ service + (1|s) + (1|d) + (1|dept), lme4::InstEval, "InstEval", "lme4",
                   large = TRUE),
  machines = model(score ~ Machine + (1|Worker) + (1|Worker:Machine), nlme::Machines,
                   "Machines", "nlme"),
  machines_s = model(score ~ Machine + (0+Machine|Worker), nlme::Machines, "Machines", "nlme"),
  orthodont = model(distance ~ age*Sex + (age|Subject), nlme::Orthodont, "Orthodont", "nlme",
                    profile = TRUE),
  oxide = model(Thickness ~ 1 + (1|Lot/Wafer), nlme::Oxide, "Oxide", "nlme"),
  pastes = model(strength ~ 1 + (1|batch/cask), lme4::Pastes, "Pastes", "lme4", profile = TRUE),
  penicillin = model(diameter ~ 1 + (1|plate) + (1|sample), lme4::Penicillin, "Penicillin",
                     "lme4", profile = TRUE),
  sleep_corr = model(Reaction ~ Days + (Days|Subject), lme4::sleepstudy, "sleepstudy", "lme4",
                     profile = TRUE),
  sleep_int = model(Reaction ~ Days + (1|Subject), lme4::sleepstudy, "sleepstudy", "lme4",
                    profile = TRUE),
  sleep_unc = model(Reaction ~ Days + (Days||Subject), lme4::sleepstudy, "sleepstudy", "lme4"),
  cake_factor = model(angle ~ recipe*temperature + (1|recipe:replicate), cake_unordered, "cake",
                      "lme4"),
  poly_spline = model(Reaction ~ poly(Days, 2) + (1|Subject), lme4::sleepstudy, "sleepstudy",
                      "lme4"))

# -- simulated data -------------------------------------------------------------------------------
# Everything is rounded before it is fitted, so that the csv holds exactly what lme4 saw.
simulated <- function(name, formula, seed, make, ...) {
  RNGkind("Mersenne-Twister", "Inversion", "Rejection")
  set.seed(seed)
  models[[name]] <<- model(formula, make(), name, "simulated", file = name, ...)
}
labels <- function(prefix, i) factor(sprintf("%s%02d", prefix, i))
unbalanced <- function(groups, n) sort(c(seq_len(groups), sample(groups, n - groups, TRUE,
                                                                  prob = rexp(groups) + 0.2)))

simulated("weights_offset", y ~ x + offset(o) + (x|g), 101, function() {
  g <- unbalanced(25, 200); x <- round(rnorm(200), 3); o <- round(rnorm(200, 5, 2), 3)
  w <- round(runif(200, 0.3, 3), 3); b <- cbind(rnorm(25, sd = 1.2), rnorm(25, sd = 0.8))
  y <- 2 + 0.5 * x + o + b[g, 1] + b[g, 2] * x + rnorm(200) / sqrt(w)
  data.frame(g = labels("g", g), x, o, w, y = round(y, 4))
}, weights = "w", kr = FALSE,  # pbkrtest 0.5.2 leaves prior weights out of its covariance
   tmb = y ~ x + offset(o) + (x|g))

simulated("aliased", y ~ x1 + f + x2 + x3 + (1|g), 102, function() {
  g <- unbalanced(15, 120); x1 <- round(rnorm(120), 2); f <- factor(sample(letters[1:3], 120, TRUE))
  x3 <- round(rnorm(120), 2); x2 <- 2 * x1 - 3 * (f == "b")  # x2 is a sum of earlier columns
  y <- 1 + x1 + 0.5 * (f == "c") + 0.3 * x3 + rnorm(15, sd = 1.5)[g] + rnorm(120)
  data.frame(g = labels("g", g), x1, f, x2, x3, y = round(y, 4))
}, tmb = y ~ x1 + f + x3 + (1|g))

simulated("nested_slash", y ~ x + (1|a/b/c), 103, function() {
  # 6 a, 2 to 4 b in each, 2 to 4 c in each b, 1 to 4 rows in each c; labels of b and c repeat.
  design <- do.call(rbind, lapply(1:6, function(a) do.call(rbind, lapply(seq_len(sample(2:4, 1)),
    function(b) do.call(rbind, lapply(seq_len(sample(2:4, 1)),
      function(c) data.frame(a, b, c, row = seq_len(sample(1:4, 1)))))))))
  n <- nrow(design); x <- round(rnorm(n), 3)
  ab <- interaction(design$a, design$b, drop = TRUE)
  abc <- interaction(ab, design$c, drop = TRUE)
  y <- 3 + x + rnorm(6, sd = 2)[design$a] + rnorm(nlevels(ab), sd = 1.5)[ab] +
    rnorm(nlevels(abc))[abc] + rnorm(n, sd = 0.7)
  data.frame(a = factor(paste0("a", design$a)), b = factor(paste0("b", design$b)),
             c = factor(paste0("c", design$c)), x, y = round(y, 4))
})

simulated("corr_one", y ~ x + (x|g), 214, function() {
  # True correlation 1 and eight groups: the estimate is on the boundary.
  g <- unbalanced(8, 64); x <- round(rnorm(64), 3); b <- rnorm(8, sd = 1.5)
  y <- 1 + x + b[g] + 0.6 * b[g] * x + rnorm(64)
  data.frame(g = labels("g", g), x, y = round(y, 4))
})

simulated("zero_slope", y ~ x + (x|g), 105, function() {
  # Each group comes twice, the second time with x negated: the likelihood is then even in the
  # covariance, which must be estimated 0, and the slopes vary less than chance would have them.
  half <- do.call(rbind, lapply(1:10, function(g) {
    m <- sample(4:9, 1); x <- round(rnorm(m), 3)
    e <- rnorm(m); e <- e - 0.9 * x * sum(x * e) / sum(x^2)
    data.frame(g, x, z = round(rnorm(1, sd = 1.5) + e, 4))
  }))
  both <- rbind(half, transform(half, g = g + 10, x = -x))
  data.frame(g = labels("g", both$g), x = both$x, y = round(2 + 0.5 * both$x + both$z, 4))
})

simulated("missing", Reaction ~ Days + (Days|Subject), 106, function() {
  frame <- lme4::sleepstudy
  frame$Reaction[c(3, 40, 41, 97, 180)] <- NA
  frame$Days[c(8, 41, 120)] <- NA
  frame
})

simulated("q4", y ~ x1 + x2 + x3 + (x1 + x2 + x3|g), 107, function() {
  n <- 900; groups <- 60; g <- unbalanced(groups, n)
  x <- round(matrix(rnorm(3 * n), n), 3)
  L <- rbind(c(1.2, 0, 0, 0), c(0.3, 0.8, 0, 0), c(-0.2, 0.25, 0.7, 0), c(0.15, -0.2, 0.2, 0.6))
  b <- matrix(rnorm(4 * groups), groups) %*% t(L)
  y <- 1 + drop(x %*% c(0.5, -0.3, 0.2)) + rowSums(cbind(1, x) * b[g, ]) + rnorm(n)
  data.frame(g = labels("g", g), x1 = x[, 1], x2 = x[, 2], x3 = x[, 3], y = round(y, 4))
})

simulated("crossed_nested", y ~ x + (x|item) + (1|site) + (1|subject) + (1|subject:session), 108,
          function() {
  # Sessions in subjects in sites, crossed with items; some items and sessions are rare.
  n <- 700; subject <- unbalanced(30, n); session <- sample(1:3, n, TRUE)
  item <- sample(12, n, TRUE, prob = rexp(12) + 0.1); site <- (subject - 1) %/% 5 + 1
  both <- interaction(subject, session); x <- round(rnorm(n), 3)
  b <- cbind(rnorm(12), 0.5 * rnorm(12))
  y <- 1 + 0.4 * x + b[item, 1] + b[item, 2] * x + rnorm(6, sd = 0.9)[site] +
    rnorm(30, sd = 0.8)[subject] + rnorm(90, sd = 0.5)[both] + rnorm(n)
  data.frame(site = labels("s", site), subject = labels("p", subject), session = labels("t", session),
             item = labels("i", item), x, y = round(y, 4))
})

# -- what is read off a fit -----------------------------------------------------------------------
rows <- function(table) {
  frame <- as.data.frame(table, check.names = FALSE)
  frame$term <- rownames(table); rownames(frame) <- NULL
  frame
}

# Conditional covariance of one level: sigma^2 Lambda (Lambda'Z'WZ Lambda + I)^-1 Lambda', Bates
# et al. (2015), eq. 58. ranef(condVar = TRUE) has no covariance between the terms of (x || g).
condvar <- function(fit) {
  Lt <- getME(fit, "Lambdat"); Zt <- getME(fit, "Zt")
  root <- Lt %*% Zt %*% Diagonal(x = sqrt(weights(fit)))
  V <- sigma(fit)^2 * crossprod(Lt, solve(tcrossprod(root) + Diagonal(nrow(Lt)), Lt))
  groups <- getME(fit, "flist"); term_group <- attr(groups, "assign"); Gp <- getME(fit, "Gp")
  first <- function(group) {
    index <- unlist(lapply(which(names(groups)[term_group] == group), function(t) {
      q <- length(fit@cnms[[t]]); Gp[t] + seq_len(q)
    }))
    as.matrix(unname(V[index, index, drop = FALSE]))
  }
  sapply(names(groups), first, simplify = FALSE)
}

ranef_rows <- function(fit) lapply(ranef(fit, condVar = FALSE), function(b) {
  out <- data.frame(level = rownames(b), b, check.names = FALSE); rownames(out) <- NULL; out
})

# Unstructured parameters of glmmTMB, started at lme4's optimum: log SDs, then the rows of the
# unit-diagonal Cholesky factor of the correlation.
tmb_theta <- function(V) {
  sd <- sqrt(diag(V)); q <- length(sd)
  L <- t(chol(cov2cor(V))); L <- L / diag(L)
  c(log(sd), unlist(lapply(seq_len(q)[-1], function(i) L[i, seq_len(i - 1)])))
}

log_variances <- function(spec, fit) {
  # lme4 puts the term with most levels first, glmmTMB keeps the order of the formula.
  bars <- findbars(spec$formula)
  blocks <- VarCorr(fit)[make.unique(vapply(bars, function(b) deparse(b[[3]]), ""))]
  stopifnot(length(blocks) == length(VarCorr(fit)), !vapply(blocks, is.null, NA))
  start <- list(beta = unname(fixef(fit)), betad = 2 * log(sigma(fit)),
                theta = unlist(lapply(blocks, tmb_theta), use.names = FALSE))
  dispersion <- if (is.null(spec$weights)) ~ 1 else ~ offset(-log(.w))
  formula <- if (is.null(spec$tmb)) spec$formula else spec$tmb
  data <- spec$data
  if (!is.null(spec$weights)) data$.w <- data[[spec$weights]]
  other <- tryCatch(glmmTMB(formula, data, dispformula = dispersion, REML = isREML(fit),
                            start = start,
                            control = glmmTMBControl(optCtrl = list(iter.max = 1e4, eval.max = 1e4,
                                                                    rel.tol = 1e-14))),
                    error = function(e) { message("glmmTMB: ", conditionMessage(e)); NULL })
  # Only a fit at the same optimum, with a Hessian that can be inverted, is kept.
  if (is.null(other) || !isTRUE(other$sdr$pdHess) ||
      abs(as.numeric(logLik(other)) - as.numeric(logLik(fit))) > 1e-5) return(list())
  terms <- function(x) unlist(lapply(x, colnames), use.names = FALSE)
  stopifnot(identical(terms(VarCorr(other)$cond), terms(blocks)))
  par <- summary(other$sdr, "fixed")
  par <- data.frame(par = rownames(par), est = par[, 1], se = par[, 2], row.names = NULL)
  par <- par[par$par != "beta", ]
  th <- par[par$par == "theta", ]; at <- 0; out <- list()
  for (i in seq_along(blocks)) {
    q <- ncol(blocks[[i]]); use <- at + seq_len(q); at <- at + q * (q + 1) / 2
    out[[i]] <- data.frame(group = sub("\\.[0-9]+$", "", names(blocks)[i]),
                           term = colnames(blocks[[i]]), log_variance = 2 * th$est[use],
                           se = 2 * th$se[use])
  }
  d <- par[par$par == "betad", ]
  out[[length(out) + 1]] <- data.frame(group = "Residual", term = "Residual",
                                       log_variance = d$est, se = d$se)
  list(glmmTMB_sdr = par, glmmTMB_logLik = unbox(as.numeric(logLik(other))),
       log_variance_glmmTMB = do.call(rbind, out))
}

named <- function(x) lapply(as.list(x), unbox)

figures <- function(spec, reml) {
  args <- list(spec$formula, data = spec$data, REML = reml, control = control)
  if (!is.null(spec$weights)) args$weights <- spec$data[[spec$weights]]
  fit <- suppressMessages(do.call(lme4::lmer, args))
  out <- list(
    reml = unbox(reml), criterion = unbox(if (reml) REMLcrit(fit) else deviance(fit)),
    logLik = unbox(as.numeric(logLik(fit))), theta = unname(getME(fit, "theta")),
    sigma = unbox(sigma(fit)), varcorr = as.data.frame(VarCorr(fit)),
    fixef = named(fixef(fit)), se = named(sqrt(diag(as.matrix(vcov(fit))))),
    AIC = unbox(AIC(fit)), BIC = unbox(BIC(fit)), singular = unbox(isSingular(fit)),
    n_used = unbox(nobs(fit)))
  if (isTRUE(spec$large)) return(out)
  dropped <- attr(getME(fit, "X"), "col.dropped")
  if (!is.null(dropped)) out$dropped <- I(names(dropped))
  out$groups <- lapply(getME(fit, "flist"), levels)
  out$ranef <- ranef_rows(fit)
  out$fitted_head <- unname(head(fitted(fit), 10))
  if (!isSingular(fit)) {
    if (reml) {
      # lmerTest re-evaluates the call, so it gets a fit of its own.
      test <- suppressMessages(do.call(lmerTest::lmer, args))
      out$satterthwaite <- rows(coef(summary(test, ddf = "Satterthwaite")))
      if (!isFALSE(spec$kr)) {
        out$kenward_roger <- rows(coef(summary(test, ddf = "Kenward-Roger")))
        out$vcov_kr <- unname(as.matrix(pbkrtest::vcovAdj(fit)))
      }
      out$anova3_satterthwaite <- rows(anova(test, type = 3, ddf = "Satterthwaite"))
    }
    out <- c(out, log_variances(spec, fit))
    if (isTRUE(spec$profile)) {
      ci <- suppressWarnings(suppressMessages(confint(fit, method = "profile", oldNames = FALSE,
                                                      quiet = TRUE)))
      out$profile_ci <- data.frame(parameter = rownames(ci), lower = ci[, 1], upper = ci[, 2],
                                   row.names = NULL)
    }
  }
  out$hat_head <- unname(head(hatvalues(fit), 10))
  out$cooks_head <- unname(head(cooks.distance(fit), 10))
  out$condvar <- condvar(fit)
  out
}

wanted <- commandArgs(trailingOnly = TRUE)
if (length(wanted) == 0) wanted <- names(models)
for (name in wanted) {
  spec <- models[[name]]
  if (!is.null(spec$file)) {
    out <- gzfile(file.path(here, paste0(spec$file, ".csv.gz")), "wb", compression = 9)
    write.csv(spec$data, out, row.names = FALSE)
    close(out)
  }
  result <- list(name = unbox(name), data = unbox(spec$dataset), package = unbox(spec$package),
                 formula = unbox(paste(deparse(spec$formula, width.cutoff = 500), collapse = "")),
                 weights = if (!is.null(spec$weights)) unbox(spec$weights),
                 n = unbox(nrow(spec$data)),
                 fits = list(REML = figures(spec, TRUE), ML = figures(spec, FALSE)))
  result <- result[!vapply(result, is.null, NA)]
  writeLines(toJSON(result, digits = NA, dataframe = "rows"),
             file.path(here, paste0(name, ".json")))
  for (f in result$fits)
    cat(sprintf("%-15s %-5s singular %-5s theta %s  keys %d\n", name,
                if (f$reml) "REML" else "ML", f$singular,
                paste(signif(f$theta, 6), collapse = " "), length(f)))
}
