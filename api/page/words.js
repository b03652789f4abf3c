// Numbers, times and sizes as words. It must not touch the page.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const time = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
const dayAndYear = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric" });
export const NONE = "–";

/** 1,234,567 */
export const count = (number) => (number === null || number === undefined ? NONE : whole.format(number));

/** 1.2M; small numbers as they are */
export const brief = (number) =>
  number === null || number === undefined ? NONE : number < 10_000 ? whole.format(number) : short.format(number);

/** 12.50 USD, 0.000123 USD: three digits that say something at the least */
export function money(amount, currency) {
  const places = amount === 0 || amount >= 1 ? 2 : Math.min(9, 3 - Math.ceil(Math.log10(amount)));
  return `${amount.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: Math.max(2, places) })} ${currency}`;
}

/** "1 job", "2 jobs" */
export const counted = (number, what) => `${count(number)} ${what}${number === 1 ? "" : "s"}`;

/** 12.3% of a share; a share that is not quite all or nothing never reads as 100% or 0% */
export function percent(share, digits = 1) {
  if (share === null || share === undefined || Number.isNaN(share)) return NONE;
  if (share === 0 || share === 1) return `${share * 100}%`;
  const least = 10 ** -digits;
  return `${Math.min(100 - least, Math.max(least, share * 100)).toFixed(digits)}%`;
}

/** 212/s, 3.4/s, 7/min */
export function rate(perSecond) {
  if (perSecond === null || perSecond === undefined) return NONE;
  if (perSecond === 0) return "0/s";
  if (perSecond >= 10) return `${brief(Math.round(perSecond))}/s`;
  if (perSecond >= 1) return `${perSecond.toFixed(1)}/s`;
  return perSecond * 60 >= 1 ? `${(perSecond * 60).toFixed(0)}/min` : `${Math.max(1, perSecond * 3600).toFixed(0)}/h`;
}

/** 45 s, 12 min 5 s, 3 h 20 min, 4 d 2 h */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return NONE;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const all = Math.round(seconds);
  const parts = [
    [Math.floor(all / 86_400), "d"],
    [Math.floor(all / 3600) % 24, "h"],
    [Math.floor(all / 60) % 60, "min"],
    [all % 60, "s"],
  ];
  const first = parts.findIndex(([amount]) => amount > 0);
  const shown = parts.slice(first, first + 2).filter(([amount]) => amount > 0);
  return shown.map(([amount, unit]) => `${amount} ${unit}`).join(" ");
}

/** 21:33:48 of today, else with its day */
export function clock(unix, now = Date.now() / 1000) {
  if (unix === null || unix === undefined) return NONE;
  const [moment, today] = [new Date(unix * 1000), new Date(now * 1000)];
  if (moment.toDateString() === today.toDateString()) return time.format(moment);
  const sameYear = moment.getFullYear() === today.getFullYear();
  return `${(sameYear ? day : dayAndYear).format(moment)}, ${time.format(moment).slice(0, 5)}`;
}

/** "12 min ago" */
export const ago = (unix, now) => `${duration(Math.max(1, now - unix)).split(" ").slice(0, 2).join(" ")} ago`;

/** 1.4 MB */
export function bytes(size) {
  if (size === null || size === undefined) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = size < 1000 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(size) / 3));
  return `${(size / 1000 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

/** JSON to be read */
export const json = (value) => JSON.stringify(value, null, 2);

/** `batch_01a2…`: enough to tell batches apart, and for `stoker status` */
export const shortId = (id) => (id.length > 24 ? `${id.slice(0, 18)}…` : id);
