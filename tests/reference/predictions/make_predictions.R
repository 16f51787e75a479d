# Predictions, their standard errors and influence by lme4 and glmmTMB, for tests/test_prediction.py
# and tests/test_diagnostics.py. From the repository root:
#     Rscript tests/reference/predictions/make_predictions.R
suppressMessages({library(lme4); library(glmmTMB); library(jsonlite)})
control <- lmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9, maxfun = 1e5),
                       calc.derivs = FALSE)
here <- "tests/reference"
csv <- function(name) read.csv(gzfile(file.path(here, paste0(name, ".csv.gz"))),
                               stringsAsFactors = TRUE)
num <- function(x) unname(as.numeric(x))
out <- list()

# Predictions of lme4: all random effects, none, and new levels where marked.
sleep <- lme4::sleepstudy
new_sleep <- data.frame(Days = c(0, 2.5, 12), Subject = c("308", "372", "new"))
fits <- list(
  sleep_corr = lmer(Reaction ~ Days + (Days | Subject), sleep, control = control),
  poly_spline = lmer(Reaction ~ poly(Days, 2) + (1 | Subject), sleep, control = control))
for (name in names(fits)) out$predict[[name]] <- list(
  newdata = new_sleep,
  all = num(predict(fits[[name]], new_sleep, allow.new.levels = TRUE)),
  none = num(predict(fits[[name]], new_sleep, re.form = NA)))
pastes <- lmer(strength ~ 1 + (1 | batch/cask), Pastes, control = control)
new_pastes <- data.frame(batch = c("A", "B", "Z"), cask = c("a", "zz", "a"))
out$predict$pastes <- list(
  newdata = new_pastes,
  all = num(predict(pastes, new_pastes, allow.new.levels = TRUE)),
  none = num(predict(pastes, new_pastes, re.form = NA)),
  batch = num(predict(pastes, new_pastes, re.form = ~ (1 | batch), allow.new.levels = TRUE)))
cake <- transform(lme4::cake, temperature = factor(temperature, ordered = FALSE))
contrasts(cake$temperature) <- contr.treatment(6)
cakes <- lmer(angle ~ recipe * temperature + (1 | recipe:replicate), cake, control = control)
new_cake <- data.frame(recipe = c("C", "A"), temperature = c("205", "175"), replicate = c(3, 15))
out$predict$cake_factor <- list(newdata = new_cake, all = num(predict(cakes, new_cake)),
                                none = num(predict(cakes, new_cake, re.form = NA)))

# Standard errors of X beta + Z b by glmmTMB under REML: `joint` from the joint precision of beta and
# b at its optimum, variance parameters taken for known; `reported` by predict(se.fit = TRUE), which
# adds their uncertainty.
se_of <- function(formula, data) {
  fit <- glmmTMB(formula, data, REML = TRUE)
  env <- fit$obj$env
  random <- env$random
  precision <- env$spHess(env$last.par.best, random = TRUE)
  covariance <- solve(as.matrix(precision))
  names <- names(env$last.par.best)[random]
  design <- cbind(as.matrix(env$data$X), as.matrix(env$data$Z))
  order <- c(which(names == "beta"), which(names == "b"))
  covariance <- covariance[order, order]
  list(joint = num(sqrt(rowSums((design %*% covariance) * design)))[1:12],
       fixed = num(sqrt(diag(design[1:12, seq_len(sum(names == "beta")), drop = FALSE] %*%
         covariance[names[order] == "beta", names[order] == "beta", drop = FALSE] %*%
         t(design[1:12, seq_len(sum(names == "beta")), drop = FALSE])))),
       reported = num(predict(fit, se.fit = TRUE)$se.fit)[1:12])
}
out$se$sleep_corr <- se_of(Reaction ~ Days + (Days | Subject), sleep)
out$se$penicillin <- se_of(diameter ~ 1 + (1 | plate) + (1 | sample), Penicillin)
out$se$machines <- se_of(score ~ Machine + (1 | Worker) + (1 | Worker:Machine), nlme::Machines)

# Exact influence by lme4: refits without each group, from scratch.
influence_of <- function(formula, data, by, weights = NULL) {
  data$.w <- if (is.null(weights)) 1 else data[[weights]]
  data$.by <- as.character(data[[by]])
  levels <- sort(unique(data$.by))
  full <- lmer(formula, data, weights = .w, control = control)
  parts <- lapply(levels, function(level) {
    kept <<- data[data$.by != level, ]
    fit <- suppressMessages(lmer(formula, kept, weights = .w, control = control))
    list(beta = num(fixef(fit)), se = num(sqrt(diag(as.matrix(vcov(fit))))),
         variances = as.data.frame(VarCorr(fit))$vcov[is.na(as.data.frame(VarCorr(fit))$var2)])
  })
  change <- t(sapply(parts, function(part) part$beta)) - rep(num(fixef(full)), each = length(levels))
  list(by = by, levels = levels, change = change,
       dfbetas = change / t(sapply(parts, function(part) part$se)),
       variances = t(sapply(parts, function(part) part$variances)))
}
out$influence$sleep_corr <- influence_of(Reaction ~ Days + (Days | Subject), sleep, "Subject")
machines <- as.data.frame(nlme::Machines)
machines$Worker <- factor(as.character(machines$Worker))
out$influence$machines <- influence_of(
  score ~ Machine + (1 | Worker) + (1 | Worker:Machine), machines, "Worker")
out$influence$weights_offset <- influence_of(y ~ x + offset(o) + (x | g), csv("weights_offset"), "g",
                                             weights = "w")
write(toJSON(out, digits = 12, auto_unbox = TRUE, dataframe = "columns"),
      file.path(here, "predictions", "predictions.json"))
