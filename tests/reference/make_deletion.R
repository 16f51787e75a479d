# Writes tests/reference/inference/deletion.json, nesting.json and ham.csv.gz, carrots.csv.gz,
# nested.csv.gz beside them: lmerTest's drop1, ranova and step, emmeans' joint_tests and nested
# factors. Run from the repository root:
#   Rscript tests/reference/make_deletion.R
# Made with R 4.2.2, lme4 1.1-31, lmerTest 3.1-3, emmeans 1.8.4-1.
suppressPackageStartupMessages({library(lme4); library(lmerTest); library(emmeans); library(jsonlite)})
here <- "tests/reference/inference"
emm_options(msg.interaction = FALSE, msg.nesting = FALSE)
control <- lmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9, maxfun = 1e5),
                       check.conv.singular = "ignore", check.rankX = "message+drop.cols")
text <- function(f) paste(deparse(f, width.cutoff = 500), collapse = "")
save_csv <- function(data, name) {
  out <- gzfile(file.path(here, paste0(name, ".csv.gz")), "wb", compression = 9)
  write.csv(data, out, row.names = FALSE); close(out)
}
lettered <- function(data, names) {  # numbers as labels would be read as covariates
  for (name in names) data[[name]] <- factor(paste0(substr(name, 1, 1), data[[name]]))
  data
}
ham <- lettered(lmerTest::ham[c("Informed.liking", "Product", "Information", "Gender", "Age",
                                "Consumer")], c("Product", "Information", "Gender", "Consumer"))
names(ham)[1] <- "liking"
carrots <- lettered(lmerTest::carrots[c("Preference", "sens1", "sens2", "Homesize", "Age", "Consumer",
                                        "Product")], c("Homesize", "Age", "Consumer"))
RNGkind("Mersenne-Twister", "Inversion", "Rejection")
set.seed(14)
nested <- local({  # seven states in three countries, regions numbered anew in each state
  n <- 160; s <- c(rep(1:7, each = 2), sample(7, n - 14, TRUE, c(3, 2, 1, 2, 1, 3, 1)))
  data.frame(y = round(rnorm(n) + s / 5 + rnorm(12)[rep_len(1:12, n)], 4), state = letters[s],
             country = c("X", "X", "X", "Y", "Y", "Z", "Z")[s],
             region = c("north", "south", "west")[ifelse(s < 4, 0, 1) + sample(2, n, TRUE)],
             t = sample(c("u", "v"), n, TRUE), x = round(rnorm(n, 2), 3), g = sprintf("g%02d", rep_len(1:12, n)))
})
save_csv(ham, "ham"); save_csv(carrots, "carrots"); save_csv(nested, "nested")
cake_factor <- transform(lme4::cake, temperature = factor(temperature, ordered = FALSE))
unbalanced <- read.csv(gzfile(file.path(here, "unbalanced.csv.gz")), stringsAsFactors = TRUE)
empty <- subset(unbalanced, !(a == "a3" & b == "b2"))

models <- list(
  list(data = "ham", formula = liking ~ Product*Information + Gender + Age +
         (1|Consumer) + (1|Consumer:Product), frame = ham),
  list(data = "carrots", formula = Preference ~ sens1*Homesize + sens2 + Age +
         (1 + sens2|Consumer) + (1|Product), frame = carrots),
  list(data = "sleepstudy", formula = Reaction ~ Days + I(Days^2) + (Days|Subject),
       frame = lme4::sleepstudy),
  list(data = "sleepstudy", formula = Reaction ~ Days + (Days||Subject), frame = lme4::sleepstudy),
  list(data = "cake", formula = angle ~ recipe*temperature + (1|recipe:replicate),
       frame = cake_factor),
  list(data = "machines", formula = score ~ Machine + (0 + Machine|Worker), frame = nlme::Machines),
  list(data = "orthodont", formula = distance ~ age*Sex + (age|Subject), frame = nlme::Orthodont),
  list(data = "pastes", formula = strength ~ 1 + (1|batch/cask), frame = lme4::Pastes),
  list(data = "dyestuff2", formula = Yield ~ 1 + (1|Batch), frame = lme4::Dyestuff2),
  list(data = "unbalanced", formula = y ~ x*z + a + (1|b:z), frame = unbalanced),
  list(data = "empty", formula = y ~ a*b + a*x + (x|g), frame = empty))
rows <- function(table) {
  frame <- as.data.frame(table, check.names = FALSE)
  frame <- cbind(term = rownames(table), frame); rownames(frame) <- NULL
  frame
}
one <- function(spec) {
  .GlobalEnv$frame <- spec$frame
  m <- suppressMessages(eval(bquote(lmerTest::lmer(.(spec$formula), frame, control = control))))
  quiet <- function(x) suppressWarnings(suppressMessages(x))
  stepped <- if (spec$data != "empty") quiet(step(m))
  list(data = unbox(spec$data), formula = unbox(text(spec$formula)),
       F = rows(drop1(m)), kenward_roger = rows(drop1(m, ddf = "Kenward-Roger")),
       chi2 = if (spec$data != "empty") rows(quiet(drop1(m, ddf = "lme4", test = "Chisq"))),
       ranova = rows(quiet(ranova(m))), whole = rows(quiet(ranova(m, reduce.terms = FALSE))),
       step = if (!is.null(stepped)) list(random = rows(stepped$random), fixed = rows(stepped$fixed),
         formula = unbox(text(formula(attr(stepped, "model"))))))
}
writeLines(toJSON(lapply(models, one), digits = NA, na = "null", null = "null"),
           file.path(here, "deletion.json"))

figures <- function(object) {
  frame <- as.data.frame(summary(object, infer = c(TRUE, TRUE)))
  names(frame) <- sub("^emmean$", "estimate", names(frame))
  names(frame) <- sub("^SE$", "std_error", sub("^p.value$", "p_value", names(frame)))
  frame[setdiff(names(frame), c("lower.CL", "upper.CL", "t.ratio"))]
}
joint <- function(data, name, formula, by = NULL, ddf = "satterthwaite") {
  m <- suppressMessages(lmerTest::lmer(formula, data, control = control))
  found <- as.data.frame(joint_tests(m, by = by, lmer.df = ddf, data = data))
  names(found) <- c("term", by, "num_df", "den_df", "statistic", "p_value",
                    if (ncol(found) > 5 + length(by)) "note")
  list(data = unbox(name), formula = unbox(text(formula)), by = by, ddf = unbox(ddf), table = found)
}
nests <- function(formula, specs, by = NULL, weights = "equal", contrast = "pairwise", at = NULL) {
  m <- suppressMessages(lmerTest::lmer(formula, nested, control = control))
  args <- list(m, specs, by = by, weights = weights, lmer.df = "satterthwaite", data = nested)
  if (!is.null(at)) args$at <- at
  means <- suppressMessages(do.call(emmeans, args))
  list(formula = unbox(text(formula)), specs = specs, by = by, weights = unbox(weights), at = at,
       nesting = means@model.info$nesting, means = figures(means),
       contrasts = figures(suppressMessages(contrast(means, contrast))))
}
n1 <- y ~ country + state + t + (1|g); n2 <- y ~ country/region + t*x + (1|g)
n3 <- y ~ t + t:region + x + (1|g)
writeLines(toJSON(list(
  joint = list(
    joint(unbalanced, "unbalanced", y ~ a*b + a*x + z + (1|g)),
    joint(unbalanced, "unbalanced", y ~ a*b + a*x + z + (1|g), ddf = "kenward-roger"),
    joint(unbalanced, "unbalanced", y ~ a*b + a*x + z + (1|g), ddf = "asymptotic"),
    joint(unbalanced, "unbalanced", y ~ a*b + a*x + z + (1|g), by = "b"),
    joint(empty, "empty", y ~ a*b + x + (1|g)), joint(empty, "empty", y ~ a*b + x + (1|g), by = "a"),
    joint(cake_factor, "cake", angle ~ recipe*temperature + (1|recipe:replicate)),
    joint(nlme::Machines, "machines", score ~ Machine + (1|Worker)),
    joint(nested, "nested", n1), joint(nested, "nested", n2), joint(nested, "nested", n3)),
  means = list(nests(n1, "country"), nests(n1, "state"), nests(n1, "t"), nests(n1, c("t", "state")),
    nests(n1, "t", by = "state"), nests(n1, "country", weights = "proportional"),
    nests(n2, "country"), nests(n2, "region"), nests(n2, c("country", "t")),
    nests(n2, "region", by = "country"), nests(n3, "t"), nests(n3, "region"))),
  digits = NA, na = "null", null = "null"), file.path(here, "nesting.json"))
