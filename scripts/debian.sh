# Sourced: packages from Debian's archive without installing them, from the mirror that the machine has, whatever suite it is
# itself set up for. Root is not needed.

# open_archive DIR SUITE... reads the package lists of these suites; what it makes goes into DIR.
open_archive() {
  local dir=$1 mirror security suite; shift
  targets() { apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "$@" 2>/dev/null | head -n 1; }
  mirror=$(targets 'Label: Debian')
  [ -n "$mirror" ] || fail "apt knows no Debian mirror; run 'apt-get update' as root"
  security=$(targets 'Label: Debian-Security')
  mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$dir/deb"
  for suite; do
    case $suite in
      *-security) [ -n "$security" ] || fail "apt knows no mirror of Debian's security updates; run 'apt-get update' as root"
        echo "$security $suite" ;;
      *) echo "$mirror $suite" ;;
    esac
  done | sed 's|.*|deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] & main|' >"$dir/sources.list"
  archive=$dir
  archive_options=(-oDir::Etc::SourceList="$dir/sources.list" -oDir::Etc::SourceParts=/dev/null -oDir::State::Lists="$dir/lists"
    -oDir::Cache="$dir/cache" -oAPT::Sandbox::User="$(id -un)" -oAcquire::Languages=none)
  apt-get -qq "${archive_options[@]}" update || fail "could not read Debian's archive"
}

# unpack DIR SUITE PACKAGE... puts the packages' files under DIR.
unpack() {
  local dir=$1 suite=$2 deb; shift 2
  (cd "$archive/deb" && apt-get -qq "${archive_options[@]}" download "${@/%//$suite}") || fail "could not download $* of $suite"
  for deb in "$archive"/deb/*.deb; do dpkg -x "$deb" "$dir"; done
  rm "$archive"/deb/*.deb
}
