# Sourced by common.sh: which recipe, its numbers, and that a run keeps them.

# `auto` is the reference job where it can run fast, else the recipe that runs everywhere.
choose_recipe() {
    RECIPE=${RECIPE:-auto}
    ! is_fork || RECIPE="of $NAME"
    [ "$RECIPE" = auto ] || return 0
    if ! command -v nvidia-smi >/dev/null || ! nvidia-smi >/dev/null 2>&1; then
        RECIPE=tiny
        say "recipe: tiny (no NVIDIA GPU found)"
    elif ! command -v nvcc >/dev/null; then
        RECIPE=tiny
        say "recipe: tiny (there is a GPU, but no nvcc to build for it)"
    else
        RECIPE=qwen2.5-0.5b
        say "recipe: qwen2.5-0.5b (GPU and nvcc found)"
    fi
}

# Whether NAME is a run that fork.sh began: its recipe is in no other place.
is_fork() { [ -n "${NAME:-}" ] && grep -qs '^FORK=' "runs/$NAME/recipe.env"; }

load_recipe() {
    local file=pipelines/recipes/$RECIPE.env
    recipe_names=()
    SCORER=${SCORER:-} # a command: never taken from a file
    if is_fork; then
        read_numbers "runs/$NAME/recipe.env"
    else
        [ -f "$file" ] || die "no recipe $RECIPE; there are: $(cd pipelines/recipes && echo *.env | sed 's/\.env//g')" 2
        recipe_names=(SEED SCORER) # a run's rewards are as much its own as its numbers
        SEED=${SEED:-1}
        read_numbers "$file"
        NAME=${NAME:-$RECIPE-$SEED}
    fi
    RUN=runs/$NAME
}

# Sets every name in a file that the environment has not set already. A file is data, wherever it comes from: bash would run commands
# that stand in the brackets of a name, or of what it takes for a number, so neither is touched before it is known to be one.
read_numbers() {
    local line name at=0 numbers texts
    read_kinds
    while IFS= read -r line || [ -n "$line" ]; do
        at=$((at + 1))
        line=${line%%#*}
        line=${line%"${line##*[![:space:]]}"}
        [ -n "$line" ] || continue
        [[ $line =~ ^([A-Z][A-Z0-9_]*)=([^[:cntrl:]]*)$ ]] || die "$1:$at: not NAME=VALUE" 3
        name=${BASH_REMATCH[1]}
        case $numbers$texts in
        *" $name "*) ;;
        *) die "$1:$at: a recipe has no $name; the names are those of pipelines/recipes/tiny.env" 3 ;;
        esac
        if [ -n "${!name+set}" ]; then
            check_value "$name" "${!name}" "environment" 2
        else
            check_value "$name" "${BASH_REMATCH[2]}" "$1:$at" 3
            printf -v "$name" %s "${line#*=}"
        fi
        recipe_names+=("$name")
    done <"$1"
}

NUMBER='^[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?$'

# The names that a recipe may have are those of `tiny`, and what is a number there is one everywhere.
read_kinds() {
    local line
    numbers=' SEED ' texts=' SCORER FORK '
    while IFS= read -r line; do
        [[ $line =~ ^([A-Z][A-Z0-9_]*)=([^[:space:]]*) ]] || continue
        if [[ ${BASH_REMATCH[2]} =~ $NUMBER ]]; then
            numbers+="${line%%=*} "
        else
            texts+="${line%%=*} "
        fi
    done <pipelines/recipes/tiny.env
}

# check_value NAME VALUE WHERE CODE: a text that began like an option would be taken for one.
check_value() {
    case $numbers in *" $1 "*) [[ $2 =~ $NUMBER ]] || die "$3: $1 is a number, and not \"$2\"" "$4" ;; esac
    [[ $2 != -* ]] || die "$3: $1 begins with a minus" "$4"
}

# A run keeps the numbers it started with: going on with others would be another run.
pin_recipe() {
    mkdir -p "$RUN/checkpoints" "$RUN/rollouts" "$RUN/eval"
    local name
    for name in "${recipe_names[@]}"; do printf '%s=%s\n' "$name" "${!name}"; done >"$RUN/.recipe.env"
    if [ -f "$RUN/recipe.env" ] && ! diff "$RUN/recipe.env" "$RUN/.recipe.env" >"$RUN/.difference"; then
        sed -n 's/^</  was:/p; s/^>/  now:/p' "$RUN/.difference" >&2
        rm "$RUN/.recipe.env" "$RUN/.difference"
        say "other numbers go into another NAME, or a fork: make fork RUN=$NAME FROM=$(step_name "$(reached_step)") NAME=... NUMBER=..."
        die "$RUN was started with other numbers; go on with those" 2
    fi
    rm -f "$RUN/.difference"
    [ -f "$RUN/recipe.env" ] || sync "$RUN/.recipe.env" # before its name says that it is whole
    mv "$RUN/.recipe.env" "$RUN/recipe.env"
}
