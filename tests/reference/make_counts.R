# Writes tests/reference/counts/: simulated counts (counts.csv.gz, a row per gene; samples.csv) and
# what edgeR, limma and lme4 make of them (voom.json). Run from the repository root:
#   Rscript tests/reference/make_counts.R
# Made with R 4.2.2, edgeR 3.40.2, limma 3.54.1, lme4 1.1-31 (bobyqa, rhoend 1e-9).
suppressPackageStartupMessages({ library(edgeR); library(limma); library(lme4); library(jsonlite) })
folder <- "tests/reference/counts"
set.seed(5)

# Twelve samples: six donors, each untreated and treated. Libraries of unequal depth; in the treated
# samples of the last donors a tenth of the genes takes much of the library.
genes <- 90; donors <- 6
samples <- data.frame(sample = sprintf("s%02d", 1:12), donor = rep(sprintf("d%d", 1:donors), each = 2),
                      treatment = rep(c("control", "drug"), donors),
                      age = rep(round(runif(donors, 20, 70)), each = 2))
level <- rnorm(genes, 4, 2)                       # log2 of the mean count
donor <- matrix(rnorm(genes * donors, 0, 0.5), genes)[, rep(1:donors, each = 2)]
drug <- outer(rnorm(genes, 0, 0.4), samples$treatment == "drug")
shift <- outer(rep(c(3, 0), c(9, genes - 9)), samples$sample %in% c("s10", "s12"))
depth <- rep(log2(runif(12, 0.3, 3)), each = genes)
mu <- 2^(level + donor + drug + shift + depth)
counts <- matrix(rnbinom(length(mu), mu = mu, size = 8), genes)
counts[c(17, 60), ] <- 0                          # never seen
dimnames(counts) <- list(sprintf("g%02d", 1:genes), samples$sample)
write.csv(counts, gzfile(file.path(folder, "counts.csv.gz")))
write.csv(samples, file.path(folder, "samples.csv"), row.names = FALSE)

factors <- function(method) unname(calcNormFactors(counts, method = method))
kept <- function(...) names(which(filterByExpr(counts, ...)))
known <- function(fit, E, lib.size) {             # limma's voom from its second step on
  x <- rowMeans(E) + mean(log2(lib.size + 1)) - log2(1e6)
  y <- sqrt(fit$sigma)
  seen <- rowSums(counts) > 0
  line <- lowess(x[seen], y[seen], f = 0.5)
  trend <- approxfun(line, rule = 2, ties = list("ordered", mean))
  at <- log2(1e-6 * t(t(2^fit$fitted) * (lib.size + 1)))
  list(sigma = fit$sigma, fitted = fit$fitted, x = x[seen], y = y[seen], line_x = line$x,
       line_y = line$y, weights = structure(trend(at)^-4, dim = dim(at)))
}
mixed <- function(E) {
  control <- lmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9, maxfun = 1e5),
                         check.conv.singular = "ignore")
  fits <- apply(E, 1, function(y) lmer(y ~ treatment + age + (1 | donor),
                                       cbind(samples, y = y), control = control))
  list(sigma = unname(sapply(fits, sigma)), fitted = unname(t(sapply(fits, predict))))
}

# Two samples in which three genes of forty are seen, those of rows 1 to 3.
few <- matrix(c(10, 20, 30, rep(0, 37), 20, 10, 60, rep(0, 37), 1:40), 40)
norm <- calcNormFactors(counts)
v <- voom(counts, model.matrix(~ treatment + age, samples), lib.size = colSums(counts) * norm,
          save.plot = TRUE)
half <- voom(counts, model.matrix(~ treatment + age, samples), span = 0.8)
result <- list(
  tmm = factors("TMM"), tmm_few = calcNormFactors(few), upperquartile = factors("upperquartile"),
  filtered = list(one_group = kept(), by_treatment = kept(group = samples$treatment),
                  strict = kept(group = samples$treatment, min.count = 30, min.total.count = 500)),
  lib_size = unname(v$targets$lib.size), E = unname(v$E),
  fixed = list(weights = unname(v$weights), x = unname(v$voom.xy$x), y = unname(v$voom.xy$y),
               line_x = v$voom.line$x, line_y = v$voom.line$y),
  wide = list(weights = unname(half$weights)),     # span 0.8, no normalisation
  mixed = known(mixed(v$E), unname(v$E), v$targets$lib.size))
write_json(result, file.path(folder, "voom.json"), digits = NA, auto_unbox = TRUE)
