# Writes tests/reference/inference/comparison.json: what lme4's anova() says of pairs and chains of
# models, by ML and, where the fixed effects are the same, by REML.
# Run from the repository root:
#   Rscript tests/reference/make_comparison.R
# Made with R 4.2.2, lme4 1.1-31.
suppressPackageStartupMessages({library(lme4); library(jsonlite)})
control <- lmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9, maxfun = 1e5),
                       check.conv.singular = "ignore")
cake <- transform(lme4::cake, temperature = factor(temperature, ordered = FALSE))
chain <- function(data, dataset, refit, ...) list(data = data, dataset = dataset, refit = refit,
                                                  formulas = list(...))
chains <- list(
  sleep_random = chain(lme4::sleepstudy, "sleepstudy", TRUE, Reaction ~ Days + (1|Subject),
                       Reaction ~ Days + (Days||Subject), Reaction ~ Days + (Days|Subject)),
  sleep_random_reml = chain(lme4::sleepstudy, "sleepstudy", FALSE, Reaction ~ Days + (1|Subject),
                            Reaction ~ Days + (Days||Subject), Reaction ~ Days + (Days|Subject)),
  sleep_fixed = chain(lme4::sleepstudy, "sleepstudy", TRUE, Reaction ~ 1 + (Days|Subject),
                      Reaction ~ Days + (Days|Subject), Reaction ~ Days + I(Days^2) + (Days|Subject)),
  cake_fixed = chain(cake, "cake", TRUE, angle ~ temperature + (1|recipe:replicate),
                     angle ~ recipe + temperature + (1|recipe:replicate),
                     angle ~ recipe * temperature + (1|recipe:replicate)),
  pastes = chain(lme4::Pastes, "Pastes", TRUE, strength ~ 1 + (1|sample),
                 strength ~ 1 + (1|sample) + (1|batch)),
  machines = chain(as.data.frame(nlme::Machines), "Machines", FALSE,
                   score ~ Machine + (1|Worker) + (1|Worker:Machine),
                   score ~ Machine + (0+Machine|Worker)),
  dyestuff2 = chain(transform(lme4::Dyestuff2, x = rep(1:5, 6)), "Dyestuff2", TRUE,
                    Yield ~ 1 + (1|Batch), Yield ~ x + (1|Batch)))

table_of <- function(spec) {
  fits <- lapply(spec$formulas, function(formula) {
    environment(formula) <- globalenv()
    fit <- suppressMessages(lmer(formula, data = spec$data, REML = TRUE, control = control))
    if (!spec$refit) return(fit)
    # A fresh fit by ML, as refitML() starts from the REML optimum and stops earlier.
    suppressMessages(lmer(formula, data = spec$data, REML = FALSE, control = control))
  })
  names <- paste0("m", seq_along(fits))
  args <- c(unname(fits), list(refit = FALSE, model.names = names))
  out <- as.data.frame(do.call(anova, args), check.names = FALSE)
  out$model <- rownames(out); rownames(out) <- NULL
  k <- out$npar; n <- nobs(fits[[1]])
  out$AICc <- out$AIC + 2 * k * (k + 1) / (n - k - 1)
  for (name in c("AIC", "AICc", "BIC")) {
    relative <- exp(-(out[[name]] - min(out[[name]])) / 2)
    out[[paste0(name, "_weight")]] <- relative / sum(relative)
  }
  out
}

result <- lapply(chains, function(spec) list(
  data = unbox(spec$dataset), refit = unbox(spec$refit),
  formulas = vapply(spec$formulas, function(f) paste(deparse(f, width.cutoff = 500), collapse = ""),
                    ""),
  table = table_of(spec)))
writeLines(toJSON(result, digits = NA, dataframe = "rows"),
           "tests/reference/inference/comparison.json")
for (name in names(result)) {cat(name, "\n"); print(result[[name]]$table, digits = 6)}
