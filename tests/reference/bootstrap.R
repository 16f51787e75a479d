# Figures that test_bootstrap.py is held against: Rscript bootstrap.R > bootstrap.txt
# Intervals by boot::boot.ci, standard errors by lme4::bootMer, p-values by pbkrtest::PBmodcomp.
suppressPackageStartupMessages({library(lme4); library(boot); library(pbkrtest); library(jsonlite)})

# boot.ci on draws that Python makes by the same formulas
k <- 1:999
draws <- exp(sin(k)); errors <- (2 + cos(3 * k)) / 10
estimate <- 1.2; error <- 0.25
influence <- exp(2 * sin(1:50)) - mean(exp(2 * sin(1:50)))
made <- structure(list(t0 = c(estimate, error^2), t = cbind(draws, errors^2), R = 999, data = 1:50, stype = "i",
                       sim = "ordinary", call = quote(boot(statistic = f))), class = "boot")
limits <- lapply(c("0.9" = 0.9, "0.95" = 0.95), function(level) {
  ci <- boot.ci(made, conf = level, type = c("basic", "stud", "perc", "bca"), L = influence)
  list(basic = ci$basic[4:5], studentized = ci$student[4:5], percentile = ci$percent[4:5],
       bca = ci$bca[4:5])
})
acceleration <- sum(influence^3) / (6 * sum(influence^2)^1.5)

quiet <- function(x) suppressMessages(suppressWarnings(x))
statistic <- function(f) {
  v <- VarCorr(f)$Subject
  c(fixef(f), sigma(f), attr(v, "stddev"), attr(v, "correlation")[2])
}
fit <- lmer(Reaction ~ Days + (Days | Subject), sleepstudy)
b <- quiet(bootMer(fit, statistic, nsim = 4000, seed = 1))
sleepstudy_figures <- list(n = 4000, bias = unname(colMeans(b$t, na.rm = TRUE) - b$t0),
                           std_error = unname(apply(b$t, 2, sd, na.rm = TRUE)))

orthodont <- as.data.frame(nlme::Orthodont)
small <- lmer(distance ~ age + Sex + (1 | Subject), orthodont, REML = FALSE)
large <- lmer(distance ~ age * Sex + (1 | Subject), orthodont, REML = FALSE)
pb <- quiet(PBmodcomp(large, small, nsim = 4000, seed = 3, cl = 1))

cat(toJSON(list(draws = list(acceleration = acceleration, limits = limits),
                sleepstudy = sleepstudy_figures,
                orthodont = list(n = 4000, statistic = pb$test$stat[1], p = pb$test$p.value[2],
                                 chi2 = pb$test$p.value[1])),
           auto_unbox = TRUE, digits = 12, pretty = TRUE))
