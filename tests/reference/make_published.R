# Writes tests/reference/published/nlme.json: models of Pinheiro and Bates (2000), Mixed-Effects
# Models in S and S-PLUS, by nlme, the program that the book is about; and schools.csv.gz, the data
# of Snijders and Bosker (1999) as nlme has them. Run from the repository root:
#   Rscript tests/reference/make_published.R
# Made with R 4.2.2, nlme 3.1-162.
suppressPackageStartupMessages({ library(nlme); library(jsonlite) })
here <- "tests/reference/published"
sharp <- lmeControl(tolerance = 1e-12, msTol = 1e-14, msMaxIter = 500)
fit <- function(fixed, random, data)
  lme(fixed, data = data, random = random, control = sharp)
fits <- list(
  fm1Machine = fit(score ~ Machine, ~ 1 | Worker, Machines),
  fm2Machine = fit(score ~ Machine, ~ 1 | Worker/Machine, Machines),
  fm3Machine = fit(score ~ Machine, ~ Machine - 1 | Worker, Machines),
  fm1Oxide = fit(Thickness ~ 1, ~ 1 | Lot/Wafer, Oxide),
  fm2Oxide = fit(Thickness ~ 1, ~ 1 | Lot, Oxide),
  fm1Orth.lme = fit(distance ~ I(age - 11), ~ I(age - 11) | Subject, Orthodont),
  fm2Orth.lme = fit(distance ~ Sex * I(age - 11), ~ I(age - 11) | Subject, Orthodont))
numbers <- function(x) { x <- suppressWarnings(as.numeric(x)); x[!is.na(x)] }
figures <- lapply(fits, function(f) {
  table <- VarCorr(f)
  list(logLik = as.numeric(logLik(f)), sd = numbers(table[, "StdDev"]),
       fixef = unname(fixef(f)), se = unname(summary(f)$tTable[, "Std.Error"]))
})
write_json(figures, file.path(here, "nlme.json"), digits = 12, auto_unbox = TRUE, pretty = TRUE)
rows <- data.frame(school = as.character(bdf$schoolNR), language = bdf$langPOST, iq = bdf$IQ.verb)
write.csv(rows, gzfile(file.path(here, "schools.csv.gz")), row.names = FALSE, quote = FALSE)
