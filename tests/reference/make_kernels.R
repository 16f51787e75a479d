# Models with known covariances of the levels, by lme4 with Z L in the place of Z, K = L L', which is
# what pedigreemm and lme4qtl do. Writes kernels/lme4.json beside kernels/herd.csv.gz and
# kernels/relationship.csv.gz, which it makes too.
#
#     Rscript tests/reference/make_kernels.R
suppressMessages({library(lme4); library(jsonlite); library(Matrix)})
folder <- "tests/reference/kernels"
set.seed(20)
n_founders <- 12; L <- 60
sire <- dam <- rep(NA_integer_, L)
for (i in (n_founders + 1):L) {
  sire[i] <- sample(seq(1, i - 1, 2), 1)
  dam[i] <- sample(seq(2, i - 1, 2), 1)
}
A <- diag(L)                                   # tabular method
for (i in seq_len(L)) {
  if (!is.na(sire[i])) {
    A[i, seq_len(i - 1)] <- A[seq_len(i - 1), i] <-
      (A[sire[i], seq_len(i - 1)] + A[dam[i], seq_len(i - 1)]) / 2
    A[i, i] <- 1 + A[sire[i], dam[i]] / 2
  }
}
names <- sprintf("a%02d", seq_len(L))
dimnames(A) <- list(names, names)
n <- 150
codes <- c(seq(11, L), sample(seq(11, L), n - 50, TRUE))   # ten founders have no records
litter <- sample(letters[1:12], n, TRUE)
x <- rnorm(n)
b <- t(chol(A)) %*% matrix(rnorm(2 * L), L)
y <- 10 + 0.5 * x + 1.3 * b[codes, 1] + 0.6 * x * b[codes, 2] +
  0.8 * rnorm(12)[match(litter, letters)] + rnorm(n)
herd <- data.frame(y = round(y, 6), x = round(x, 6), w = round(runif(n, 0.5, 2), 3),
                   animal = names[codes], litter = litter)
write.csv(herd, gzfile(file.path(folder, "herd.csv.gz")), row.names = FALSE, quote = FALSE)
write.csv(data.frame(animal = names, sire = names[sire], dam = names[dam]),
          gzfile(file.path(folder, "pedigree.csv.gz")), row.names = FALSE, quote = FALSE)

fitted_with <- function(formula, REML = TRUE, weights = NULL) {
  herd$weights_ <- if (is.null(weights)) rep(1, n) else herd[[weights]]
  parts <- lFormula(formula, herd, REML = REML, weights = weights_)
  flist <- parts$reTrms$flist
  Zt <- as.matrix(parts$reTrms$Zt)
  start <- 0
  for (k in seq_along(parts$reTrms$cnms)) {
    q <- length(parts$reTrms$cnms[[k]])
    factor <- flist[[attr(flist, "assign")[k]]]
    rows <- start + seq_len(q * nlevels(factor))
    if (names(parts$reTrms$cnms)[k] == "animal") {  # effects of a level stand side by side
      root <- t(chol(A[levels(factor), levels(factor)]))
      Zt[rows, ] <- kronecker(t(root), diag(q)) %*% Zt[rows, ]
    }
    start <- start + q * nlevels(factor)
  }
  parts$reTrms$Zt <- as(Matrix(Zt, sparse = TRUE), "dgCMatrix")
  # A factor that is dense: its pattern must hold all products.
  devfun <- do.call(mkLmerDevfun, parts)
  best <- NULL
  for (start in c(1, 0.3)) {
    found <- optimizeLmer(devfun, optimizer = "bobyqa",
                          start = start * parts$reTrms$theta,
                          control = list(rhoend = 1e-9, maxfun = 5000))
    if (is.null(best) || found$fval < best$fval) best <- found
  }
  devfun(best$par)
  fit <- mkMerMod(environment(devfun), best, parts$reTrms, fr = parts$fr)
  variances <- as.data.frame(VarCorr(fit))
  list(criterion = best$fval, beta = unname(fixef(fit)),
       se = unname(sqrt(diag(as.matrix(vcov(fit))))),
       vcov = variances$vcov, group = variances$grp)
}

models <- list(
  one = fitted_with(y ~ x + (1 | animal)),
  one_ml = fitted_with(y ~ x + (1 | animal), REML = FALSE),
  one_weights = fitted_with(y ~ x + (1 | animal), weights = "w"),
  litter = fitted_with(y ~ x + (1 | animal) + (1 | litter)),
  slope = fitted_with(y ~ x + (x | animal) + (1 | litter))
)
write(toJSON(list(R = R.version.string, lme4 = as.character(packageVersion("lme4")),
                  models = models), digits = NA, auto_unbox = TRUE, pretty = TRUE),
      file.path(folder, "lme4.json"))
