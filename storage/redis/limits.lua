-- One call of one gateway process (a replica): what it has open, what it corrects, what it wants to take.
--
-- KEYS[1]  what this replica's last call was answered     KEYS[2]  when each replica was last heard
-- KEYS[3…] counts; the call names them by their place in KEYS
-- ARGV[1]  MessagePack: {replica, number, time, open, corrections, shapes, reservations}
--   open          {key, count}                 answers this replica has open, absolute
--   corrections   {key, second, delta}         of a window, or with second < 0 of a period
--   shapes        {{key, kind, limit, seed, ttl}…}   the meters of some reservations; kinds as below
--   reservations  {shape, second, amounts}     all of the shape's meters or none
-- Answers MessagePack, one list: for each reservation either 0, what is used of each meter, and the second that each has
-- booked it under, or the place of the meter without room and the seconds until its window has some (-1: not known).
--
-- Calls of a replica are numbered. A call that comes again, or too late, changes nothing and gets the last answer:
-- whoever lost an answer may ask again.

local WINDOW, PERIOD = 0, 1
local WINDOW_S, WINDOW_TTL_S = 60, 122
local REPLICA_DEAD_AFTER_S, PARALLEL_TTL_S, CALLS_TTL_S = 10, 60, 86400

local replica, number, time, open, corrections, shapes, reservations = unpack(cmsgpack.unpack(ARGV[1]))

local last = redis.call('HMGET', KEYS[1], 'number', 'answer')
if last[1] and tonumber(last[1]) >= number then
  return last[2]
end

-- Which replicas are alive.
redis.call('HSET', KEYS[2], replica, string.format('%.3f', time))
redis.call('EXPIRE', KEYS[2], CALLS_TTL_S)
local is_alive = {}
local heard = redis.call('HGETALL', KEYS[2])
for i = 1, #heard, 2 do
  if tonumber(heard[i + 1]) < time - REPLICA_DEAD_AFTER_S then
    redis.call('HDEL', KEYS[2], heard[i])
  else
    is_alive[heard[i]] = true
  end
end

-- Counts are read once, changed here, and written once.
local windows, periods, answers = {}, {}, {}

local function window(key)
  local found = windows[key]
  if not found then
    local packed = redis.call('GET', KEYS[key])
    found = {total = 0, seconds = {}, amounts = {}}
    if packed then
      found.total, found.seconds, found.amounts = unpack(cmsgpack.unpack(packed))
    end
    windows[key] = found
  end
  return found
end

local function expire(found, second)
  local seconds, amounts = found.seconds, found.amounts
  local count = #seconds
  while count > 0 and seconds[count] > second + WINDOW_S do
    found.total = found.total - amounts[count]
    seconds[count], amounts[count] = nil, nil
    count = count - 1
  end
  local gone = 0
  while gone < count and seconds[gone + 1] < second - WINDOW_S do
    gone = gone + 1
    found.total = found.total - amounts[gone]
  end
  if gone > 0 then
    for i = 1, count do
      seconds[i], amounts[i] = seconds[i + gone], amounts[i + gone]
    end
  end
end

local function book(found, second, amount)
  local count = #found.seconds
  if count > 0 and found.seconds[count] >= second then
    found.amounts[count] = found.amounts[count] + amount
  else
    count = count + 1
    found.seconds[count], found.amounts[count] = second, amount
  end
  found.total = found.total + amount
  found.is_changed = true
  return found.seconds[count]
end

local function wait_for(found, amount, limit, second)
  local excess, frees_at = found.total + amount - limit, second
  for i = 1, #found.seconds do
    if excess <= 0 then break end
    excess = excess - found.amounts[i]
    frees_at = found.seconds[i] + WINDOW_S + 1
  end
  return math.max(1, frees_at - second)
end

local function period(key)
  local found = periods[key]
  if not found then
    local used = redis.call('GET', KEYS[key])
    found = {used = tonumber(used or 0), is_known = used and true}
    periods[key] = found
  end
  return found
end

local function answers_of(key)
  local found = answers[key]
  if not found then
    found = {own = 0, others = 0}
    local counts = redis.call('HGETALL', KEYS[key])
    for i = 1, #counts, 2 do
      if counts[i] == replica then
        found.own = tonumber(counts[i + 1])
      elseif is_alive[counts[i]] then
        found.others = found.others + tonumber(counts[i + 1])
      else
        redis.call('HDEL', KEYS[key], counts[i])
      end
    end
    answers[key] = found
  end
  return found
end

for _, entry in ipairs(open) do
  answers_of(entry[1]).own = entry[2]
end

for _, entry in ipairs(corrections) do
  local key, second, delta = unpack(entry)
  if second < 0 then
    local found = period(key)
    if found.is_known then
      found.used = found.used + delta
      found.is_changed = true
    end
  else
    local found = window(key)
    for i = #found.seconds, 1, -1 do
      if found.seconds[i] == second then
        found.amounts[i] = found.amounts[i] + delta
        found.total = found.total + delta
        found.is_changed = true
        break
      end
    end
  end
end

local function used_of(second, key, kind, seed)
  if kind == WINDOW then
    local found = window(key)
    expire(found, second)
    return found.total
  elseif kind == PERIOD then
    local found = period(key)
    found.used = math.max(found.used, seed)
    return found.used
  end
  local found = answers_of(key)
  return found.others + found.own
end

local function take(second, key, kind, amount, ttl)
  if kind == WINDOW then
    local found = window(key)
    local booked_at = book(found, second, amount)
    return found.total, booked_at
  elseif kind == PERIOD then
    local found = period(key)
    found.used, found.ttl, found.is_known, found.is_changed = found.used + amount, ttl, true, true
    return found.used, 0
  end
  local found = answers_of(key)
  found.own = found.own + amount
  return found.others + found.own, 0
end

local verdicts = {}
for _, reservation in ipairs(reservations) do
  local shape, second, amounts = unpack(reservation)
  local meters, count = shapes[shape], #verdicts
  local refused
  for i, meter in ipairs(meters) do
    local key, kind, limit, seed = unpack(meter)
    local amount = amounts[i]
    if used_of(second, key, kind, seed) + amount > limit then
      refused = i
      verdicts[count + 1] = i
      verdicts[count + 2] = kind == WINDOW and amount <= limit and wait_for(window(key), amount, limit, second) or -1
      break
    end
  end
  if not refused then
    verdicts[count + 1] = 0
    for i, meter in ipairs(meters) do
      local used, booked_at = take(second, meter[1], meter[2], amounts[i], meter[5])
      verdicts[count + 1 + i] = used
      verdicts[count + 1 + #meters + i] = booked_at
    end
  end
end

for key, found in pairs(windows) do
  if found.is_changed then
    redis.call('SET', KEYS[key], cmsgpack.pack({found.total, found.seconds, found.amounts}), 'EX', WINDOW_TTL_S)
  end
end
for key, found in pairs(periods) do
  if found.is_changed then
    -- Not tostring: it keeps 14 digits only.
    redis.call('SET', KEYS[key], string.format('%.0f', found.used), 'KEEPTTL')
    if found.ttl then
      redis.call('EXPIRE', KEYS[key], found.ttl)
    end
  end
end
for key, found in pairs(answers) do
  if found.own > 0 then
    redis.call('HSET', KEYS[key], replica, string.format('%.0f', found.own))
    redis.call('EXPIRE', KEYS[key], PARALLEL_TTL_S)
  else
    redis.call('HDEL', KEYS[key], replica)
  end
end

local answer = cmsgpack.pack(verdicts)
redis.call('HSET', KEYS[1], 'number', number, 'answer', answer)
redis.call('EXPIRE', KEYS[1], CALLS_TTL_S)
return answer
