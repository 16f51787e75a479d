# Fits by blme with densities of the covariance matrices: penalties/blme.json.
# Debian: r-cran-blme, r-cran-jsonlite. Run here: Rscript make_penalties.R
suppressMessages(library(blme))
# blme's default optimiser stops early with these data; this one ends where the gradient is zero.
control <- lmerControl(
  optimizer = "Nelder_Mead", calc.derivs = FALSE, check.conv.grad = "ignore",
  optCtrl = list(maxfun = 1e5, FtolAbs = 1e-14, FtolRel = 1e-15, XtolRel = 1e-11)
)

cases <- list(
  list(name = "gamma by default", data = "Dyestuff2", formula = "Yield ~ 1 + (1 | Batch)",
       prior = "gamma"),
  list(name = "gamma by default, ML", data = "Dyestuff2", formula = "Yield ~ 1 + (1 | Batch)",
       prior = "gamma", reml = FALSE),
  list(name = "Wishart of one effect", data = "Dyestuff", formula = "Yield ~ 1 + (1 | Batch)",
       prior = "wishart"),
  list(name = "Wishart of two effects", data = "sleepstudy",
       formula = "Reaction ~ Days + (Days | Subject)", prior = "wishart"),
  list(name = "Wishart with a scale", data = "sleepstudy",
       formula = "Reaction ~ Days + (Days | Subject)",
       prior = "wishart(df = 5, scale = matrix(c(2, 0.1, 0.1, 0.5), 2))"),
  list(name = "gamma of the SD", data = "sleepstudy", formula = "Reaction ~ Days + (1 | Subject)",
       prior = "gamma(shape = 2, rate = 0.5)"),
  list(name = "gamma of the variance", data = "sleepstudy",
       formula = "Reaction ~ Days + (1 | Subject)",
       prior = "gamma(shape = 2, rate = 0.5, posterior.scale = 'var')"),
  list(name = "gamma in the response's units", data = "sleepstudy",
       formula = "Reaction ~ Days + (1 | Subject)",
       prior = "gamma(shape = 3, rate = 0.1, common.scale = FALSE)"),
  list(name = "one of two factors", data = "Pastes", formula = "strength ~ 1 + (1 | batch/cask)",
       prior = "batch ~ gamma"),
  list(name = "both of two factors", data = "Penicillin",
       formula = "diameter ~ 1 + (1 | plate) + (1 | sample)", prior = "wishart")
)

fit <- function(case) {
  reml <- is.null(case$reml)
  text <- sprintf("blmer(%s, %s, REML = %s, control = control, cov.prior = %s)",
                  case$formula, case$data, reml, case$prior)
  f <- eval(parse(text = text))
  own <- as.data.frame(VarCorr(f))
  dev <- grep("^Prior dev", capture.output(print(f)), value = TRUE)
  list(
    name = case$name, data = tolower(case$data), formula = case$formula, prior = case$prior,
    method = if (reml) "REML" else "ML",
    groups = own$grp, first = own$var1, second = own$var2, vcov = own$vcov,
    beta = unname(fixef(f)), se = unname(sqrt(diag(as.matrix(vcov(f))))),
    criterion = if (reml) REMLcrit(f) else deviance(f),
    prior_deviance = as.numeric(sub(".*:", "", dev))
  )
}
writeLines(
  jsonlite::toJSON(list(blme = as.character(packageVersion("blme")), fits = lapply(cases, fit)),
                   digits = NA, auto_unbox = TRUE, pretty = TRUE, na = "null"),
  "penalties/blme.json"
)
