# Writes tests/reference/residuals/robust.json: clubSandwich's covariances, degrees of freedom and
# joint tests of lmer and gls fits. Run from the repository root:
#   Rscript tests/reference/make_robust.R
# Made with R 4.2.2, clubSandwich 0.5.8, lme4 1.1-31, nlme 3.1-162.
suppressPackageStartupMessages({library(lme4); library(nlme); library(clubSandwich); library(jsonlite)})
here <- "tests/reference/residuals"
control <- lmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9, maxfun = 1e5))
fev <- read.csv(gzfile(file.path(here, "fev.csv.gz")))
fev <- fev[!is.na(fev$FEV1), ]
for (name in c("RACE", "ARMCD", "AVISIT", "USUBJID", "SEX")) fev[[name]] <- factor(fev[[name]])
fev$V <- as.integer(fev$AVISIT)
fev <- fev[order(fev$USUBJID, fev$V), ]
set.seed(3)
uneven <- sleepstudy[-sample(nrow(sleepstudy), 60), ]
write.csv(uneven, gzfile(file.path(here, "uneven.csv.gz")), row.names = FALSE)
fits <- list(
  uneven = list(lmer(Reaction ~ Days + I(Days^2) + (Days | Subject), uneven, control = control), "Subject"),
  pastes = list(lmer(strength ~ cask + (1 | batch/cask), Pastes, control = control), "batch"),
  fev = list(gls(FEV1 ~ ARMCD + AVISIT, fev, correlation = corSymm(form = ~ V | USUBJID),
                 weights = varIdent(form = ~ 1 | AVISIT),
                 control = glsControl(tolerance = 1e-10, msTol = 1e-12, maxIter = 500, msMaxIter = 500)), "USUBJID"))
record <- lapply(fits, function(own) {
  m <- own[[1]]
  cluster <- if (own[[2]] == "batch") Pastes$batch else if (own[[2]] == "Subject") uneven$Subject else fev$USUBJID
  kinds <- list(CR0 = "CR0", CR1 = "CR1", CR2 = "CR2", CR3 = "CR3")
  lapply(kinds, function(kind) {
    V <- vcovCR(m, cluster = cluster, type = kind)
    tests <- coef_test(m, vcov = V, test = "Satterthwaite")
    b <- if (inherits(m, "gls")) coef(m) else fixef(m)
    joint <- Wald_test(m, constraints = constrain_zero(2:length(b), coefs = b), vcov = V, test = "HTZ")
    list(se = sqrt(diag(as.matrix(V))), df = if (is.null(tests$df_Satt)) tests$df else tests$df_Satt,
         F = joint$Fstat, df_num = joint$df_num, df_den = joint$df_denom)
  })
})
write(toJSON(record, digits = NA, auto_unbox = TRUE, pretty = TRUE), file.path(here, "robust.json"))
