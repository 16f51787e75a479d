# Writes jaxreml/datasets/<name>.json.xz from the data sets of lme4 and nlme.
# Run from the repository root:  Rscript tests/reference/make_datasets.R
#
# A file is one JSON object, column name -> {"kind", "values"[, "levels", "ordered"]}; the values
# of a factor are codes into its levels, counted from 0.
suppressPackageStartupMessages({ library(lme4); library(nlme); library(jsonlite) })

frames <- list(
  dyestuff = lme4::Dyestuff, dyestuff2 = lme4::Dyestuff2, sleepstudy = lme4::sleepstudy,
  penicillin = lme4::Penicillin, pastes = lme4::Pastes, cake = lme4::cake,
  insteval = lme4::InstEval,
  orthodont = nlme::Orthodont, machines = nlme::Machines, oxide = nlme::Oxide)

# Factors that R stores as ordered for plotting only (nlme's grouping factors).
plot_order_only <- c("Subject", "Worker")

column <- function(name, x) {
  if (is.factor(x)) {
    list(kind = unbox("factor"), ordered = unbox(is.ordered(x) && !name %in% plot_order_only),
         levels = levels(x), values = as.integer(x) - 1L)
  } else {
    list(kind = unbox(if (is.integer(x)) "integer" else "float"), values = as.vector(x))
  }
}

for (name in names(frames)) {
  frame <- as.data.frame(frames[[name]])
  stopifnot(!anyNA(frame))
  columns <- Map(column, names(frame), frame)
  text <- toJSON(columns, digits = NA)
  read_back <- fromJSON(text)
  for (col in names(frame)) if (is.numeric(frame[[col]]))
    stopifnot(identical(as.numeric(read_back[[col]]$values), as.numeric(frame[[col]])))
  path <- file.path("jaxreml/datasets", paste0(name, ".json.xz"))
  out <- xzfile(path, "wb", compression = -9)
  writeLines(text, out, sep = "")
  close(out)
  cat(sprintf("%-12s %6d rows %8d bytes\n", name, nrow(frame), file.size(path)))
}
