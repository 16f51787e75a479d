# Writes tests/reference/inference/<model>.json (and unbalanced.csv.gz, which is simulated).
# Run from the repository root:
#   Rscript tests/reference/make_inference.R            all models, half a minute
#   Rscript tests/reference/make_inference.R cake       some
# Made with R 4.2.2, lme4 1.1-31, lmerTest 3.1-3, pbkrtest 0.5.2, emmeans 1.8.4-1.
# README.md beside this file explains the keys.
suppressPackageStartupMessages({
  library(lme4); library(lmerTest); library(pbkrtest); library(emmeans); library(jsonlite)
})
here <- "tests/reference/inference"
dir.create(here, showWarnings = FALSE)
emm_options(msg.interaction = FALSE)
control <- lmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9, maxfun = 1e5),
                       check.conv.singular = "ignore", check.rankX = "message+drop.cols")

# -- models ---------------------------------------------------------------------------------------
# `keep`: the fixed effects of KRmodcomp's smaller model. `L`: matrices of contrasts.
# `means`: cases of emmeans; `trends`: cases of emtrends.
model <- function(formula, data, ..., kr = TRUE) list(formula = formula, data = as.data.frame(data),
                                                      kr = kr, ...)
means <- function(specs, by = NULL, at = NULL, weights = "equal", contrasts = "pairwise")
  list(specs = specs, by = by, at = at, weights = weights, contrasts = contrasts)
trends <- function(var, specs, by = NULL, at = NULL, contrasts = "pairwise")
  list(var = var, specs = specs, by = by, at = at, contrasts = contrasts)
all_contrasts <- c("pairwise", "revpairwise", "trt.vs.ctrl", "eff", "poly")

cake_factor <- transform(lme4::cake, temperature = factor(temperature, ordered = FALSE))
unit <- function(p, ...) { rows <- c(...); diag(p)[rows, , drop = FALSE] }

RNGkind("Mersenne-Twister", "Inversion", "Rejection")
set.seed(301)
unbalanced <- local({
  # Two factors of unequal frequencies, all cells filled, a covariate, a covariate of 0 and 1.
  n <- 160; g <- sort(c(1:20, sample(20, n - 20, TRUE)))
  a <- sample(c("a1", "a2", "a3"), n, TRUE, c(5, 3, 2)); b <- sample(c("b1", "b2"), n, TRUE, 2:1)
  x <- round(rnorm(n, 3), 3); z <- as.numeric(runif(n) < 0.3)
  o <- round(rnorm(n, 1), 3); w <- round(runif(n, 0.4, 2.5), 3)
  y <- 10 + 2 * (a == "a2") - (b == "b2") + 1.5 * (a == "a3" & b == "b2") + x * (1 + (a == "a3")) +
    0.7 * z + rnorm(20)[g] + rnorm(n)
  data.frame(g = sprintf("g%02d", g), a = factor(a), b = factor(b), x, z, o, w, y = round(y, 4))
})
empty <- subset(unbalanced, !(a == "a3" & b == "b2"))

models <- list(
  sleepstudy = model(Reaction ~ Days + (Days|Subject), lme4::sleepstudy, keep = ~ 1,
    L = list(unit(2, 1, 2), rbind(c(1, 9), c(1, 0), c(0, 1))),
    means = list(means("Days", at = list(Days = c(0, 3.5, 9)), contrasts = c("pairwise", "poly")),
                 means("Days")),
    trends = list(trends("Days", "1", contrasts = NULL))),
  cake_factor = model(angle ~ recipe*temperature + (1|recipe:replicate), cake_factor,
    keep = ~ recipe + temperature,
    L = list(unit(18, 9:18), unit(18, 2, 3), rbind(unit(18, 4), unit(18, 5) - unit(18, 4))),
    means = list(means("recipe", contrasts = all_contrasts), means("temperature",
                 contrasts = all_contrasts), means(c("recipe", "temperature"), contrasts = NULL),
                 means("temperature", by = "recipe", contrasts = c("revpairwise", "poly")))),
  cake = model(angle ~ recipe*temp + (1|recipe:replicate), lme4::cake, keep = ~ recipe + temp,
    L = list(unit(6, 5, 6), unit(6, 2, 3), unit(6, 2, 3, 5, 6)),
    means = list(means("recipe"), means("recipe", by = "temp", at = list(temp = c(175, 225)))),
    trends = list(trends("temp", "recipe"))),
  machines = model(score ~ Machine + (1|Worker) + (1|Worker:Machine), nlme::Machines, keep = ~ 1,
    L = list(unit(3, 2, 3), unit(3, 1, 2, 3), rbind(c(0, 1, 0), c(0, 0, 1), c(0, 1, -1))),
    means = list(means("Machine", contrasts = all_contrasts))),
  machines_s = model(score ~ Machine + (0+Machine|Worker), nlme::Machines, keep = ~ 1,
    L = list(unit(3, 2, 3), unit(3, 1, 2, 3)),
    means = list(means("Machine", contrasts = c("pairwise", "eff")))),
  machines_cells = model(score ~ 0 + Machine + (1|Worker), nlme::Machines,
    L = list(rbind(c(-1, 1, 0), c(-1, 0, 1))), means = list(means("Machine"))),
  orthodont = model(distance ~ age*Sex + (age|Subject), nlme::Orthodont, keep = ~ age,
    L = list(unit(4, 3, 4), unit(4, 2, 4), rbind(c(1, 14, 1, 14), c(1, 14, 0, 0))),
    means = list(means("Sex"), means("Sex", by = "age", at = list(age = c(8, 14))),
                 means(c("Sex", "age"), at = list(age = c(8, 14)), contrasts = NULL)),
    trends = list(trends("age", "Sex"))),
  unbalanced = model(y ~ a*b + a*x + z + (1|g), unbalanced, keep = ~ a + b + x + a:x + z,
    L = list(unit(10, 7, 8), unit(10, 2, 3), rbind(unit(10, 2, 3), c(0, 1, -1, rep(0, 7)))),
    means = list(means("a", contrasts = all_contrasts), means("a", weights = "proportional"),
                 means("b", weights = "proportional"), means("z"),
                 means("z", weights = "proportional"), means("a", by = "b"),
                 means("a", by = "b", weights = "proportional"), means(c("a", "b"), at = list(z = 1)),
                 means("1", contrasts = NULL)),
    trends = list(trends("x", "a"))),
  empty_cell = model(y ~ a*b + x + (1|g), empty, L = list(unit(6, 6)),
    means = list(means("a"), means("a", by = "b"), means(c("a", "b")), means("b"))),
  weighted = model(y ~ a + b + x + offset(o) + (1|g), unbalanced, weights = "w", kr = FALSE,
    L = list(unit(5, 2, 3)),
    means = list(means("a"), means("a", weights = "proportional"), means("1", contrasts = NULL),
                 means("b", weights = "proportional"))))

# -- what is read off a fit -----------------------------------------------------------------------
rows <- function(table) {
  frame <- as.data.frame(table, check.names = FALSE)
  frame$term <- rownames(table); rownames(frame) <- NULL
  frame
}
methods <- function(spec) c("Satterthwaite", if (spec$kr) "Kenward-Roger")
key <- function(ddf) sub("-", "_", tolower(ddf))
by_method <- function(spec, f)
  setNames(lapply(methods(spec), f), vapply(methods(spec), key, ""))
bare <- function(M) unname(as.matrix(M))

anovas <- function(spec, fit) {
  types <- c("I", "II", "III")
  setNames(lapply(types, function(type)
    by_method(spec, function(ddf) rows(anova(fit, type = type, ddf = ddf)))), types)
}

contests <- function(spec, fit) lapply(spec$L, function(L) c(
  list(L = bare(L)),
  by_method(spec, function(ddf) list(
    joint = contestMD(fit, L, ddf = ddf),
    each = do.call(rbind, lapply(seq_len(nrow(L)), function(i) contest1D(fit, L[i, ], ddf = ddf)))))))

kr_drop <- function(spec, fit) {
  smaller <- formula(paste(deparse(spec$formula[[2]]), "~", as.character(spec$keep)[2], "+",
                           paste0("(", vapply(findbars(spec$formula), deparse, ""), ")",
                                  collapse = " + ")))
  other <- suppressMessages(lmerTest::lmer(smaller, spec$data, control = control))
  test <- KRmodcomp(fit, other)
  list(keep = unbox(as.character(spec$keep)[2]), L = bare(test$L),
       test = rows(test$test))
}

# Tables of emmeans: labels as text, then the figures. Adjusted ones with Satterthwaite's df only.
figures <- function(object, adjust = "none") {
  frame <- as.data.frame(summary(object, infer = c(TRUE, TRUE), adjust = adjust))
  at <- which(names(frame) == "SE") - 1
  names(frame) <- sub("^(asymp|lower)\\.(LCL|CL)$", "conf_low", names(frame))
  names(frame) <- sub("^(asymp|upper)\\.(UCL|CL)$", "conf_high", names(frame))
  names(frame) <- sub("^[tz]\\.ratio$", "statistic", sub("^p\\.value$", "p_value", names(frame)))
  names(frame)[at] <- "estimate"; names(frame)[at + 1] <- "std_error"
  frame$df <- ifelse(is.infinite(frame$df), NA, frame$df)
  labels <- seq_len(at - 1)
  frame[labels] <- lapply(frame[labels], as.character)
  frame
}
tables <- function(object, ddf, adjustments) c(
  list(rows = figures(object)),
  if (ddf == "satterthwaite") list(adjusted = setNames(lapply(adjustments, function(adjust)
    as.list(figures(object, adjust)[c("p_value", "conf_low", "conf_high")])), adjustments)))
adjustments <- c("bonferroni", "holm", "sidak", "BH")

one_case <- function(spec, fit, case) {
  dfs <- c("satterthwaite", if (spec$kr) "kenward-roger", "asymptotic")
  by_df <- setNames(lapply(dfs, function(ddf) {
    args <- list(fit, case$specs, lmer.df = ddf, data = spec$data)
    for (name in c("by", "at", "var")) if (!is.null(case[[name]])) args[[name]] <- case[[name]]
    if (!is.null(case$weights)) args$weights <- case$weights
    result <- suppressMessages(do.call(if (is.null(case$var)) emmeans else emtrends, args))
    contrasts <- lapply(setNames(case$contrasts, case$contrasts), function(method)
      tables(contrast(result, method), ddf, c(adjustments, if (grepl("pair", method)) "tukey")))
    c(list(means = tables(result, ddf, c("sidak", "bonferroni"))),
      if (length(contrasts)) list(contrasts = contrasts))
  }), sub("-", "_", dfs))
  setting <- case[setdiff(names(case), "contrasts")]
  c(list(specs = I(setting$specs)), lapply(setting[c("var", "by", "weights")], function(x)
    if (is.null(x)) NULL else unbox(x)), list(at = setting$at), by_df)
}
drop_null <- function(x) x[!vapply(x, is.null, NA)]

# -- adjustments by the joint distribution of the tests -------------------------------------------
# Balanced data have whole degrees of freedom, which `mvt` of emmeans rounds others down to.
adjusted <- function(name, specs, by = NULL, contrasts, ddf = "satterthwaite") {
  spec <- models[[name]]
  fit <- suppressMessages(lmerTest::lmer(spec$formula, spec$data, control = control))
  means <- suppressMessages(emmeans(fit, specs, by = by, lmer.df = ddf))
  list(model = unbox(name), specs = unbox(specs), by = by, ddf = unbox(ddf),
       contrasts = lapply(setNames(contrasts, contrasts), function(method) {
         found <- contrast(means, method)
         list(default = unbox(found@misc$adjust), rows = lapply(
           list(dunnettx = "dunnettx", mvt = "mvt"), function(adjust)
             as.list(figures(found, adjust)[c("contrast", "p_value", "conf_low", "conf_high")])))
       }))
}
adjustments_json <- function() {
  set.seed(1)
  controls <- c("trt.vs.ctrl", "trt.vs.ctrlk", "consec")
  cases <- list(
    adjusted("machines", "Machine", contrasts = c(controls, "pairwise", "eff")),
    adjusted("cake_factor", "temperature", contrasts = controls),
    adjusted("cake_factor", "temperature", by = "recipe", contrasts = "consec", ddf = "kenward-roger"),
    adjusted("unbalanced", "a", by = "b", contrasts = c(controls, "pairwise"), ddf = "asymptotic"))
  writeLines(toJSON(cases, digits = NA, null = "null"), file.path(here, "adjustments.json"))
}

wanted <- commandArgs(trailingOnly = TRUE)
if (length(wanted) == 0) wanted <- c(names(models), "adjustments")
if ("adjustments" %in% wanted) adjustments_json()
wanted <- setdiff(wanted, "adjustments")
out <- gzfile(file.path(here, "unbalanced.csv.gz"), "wb", compression = 9)
write.csv(unbalanced, out, row.names = FALSE)
close(out)
for (name in wanted) {
  spec <- models[[name]]
  args <- list(spec$formula, data = spec$data, control = control)
  if (!is.null(spec$weights)) args$weights <- spec$data[[spec$weights]]
  fit <- suppressMessages(do.call(lmerTest::lmer, args))
  result <- list(
    formula = unbox(paste(deparse(spec$formula, width.cutoff = 500), collapse = "")),
    weights = if (!is.null(spec$weights)) unbox(spec$weights), sigma = unbox(sigma(fit)),
    fixed_names = I(names(fixef(fit))),
    coefficients = by_method(spec, function(ddf) rows(coef(summary(fit, ddf = ddf)))),
    vcov = bare(vcov(fit)), vcov_adj = if (spec$kr) bare(vcovAdj(fit)),
    anova = anovas(spec, fit), contests = contests(spec, fit),
    kr_drop = if (!is.null(spec$keep)) kr_drop(spec, fit),
    means = lapply(spec$means, function(case) drop_null(one_case(spec, fit, case))),
    trends = lapply(spec$trends, function(case) drop_null(one_case(spec, fit, case))))
  writeLines(toJSON(drop_null(result), digits = NA, dataframe = "rows", na = "null"),
             file.path(here, paste0(name, ".json")))
  cat(sprintf("%-15s theta %s\n", name, paste(signif(getME(fit, "theta"), 6), collapse = " ")))
}
